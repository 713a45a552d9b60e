"""Fields that would change an answer: none is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from edgecompose.errors import ApiError
from edgecompose.server.unsupported import FIELDS, refuse_unsupported


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_accepted_with_what_changes_nothing_and_refused_by_name_with_all_else(name: str) -> None:
    for value in (None, *FIELDS[name].neutral):
        refuse_unsupported({name: value})
    for value in ("something", {"a": 1}, [1], 17, True, False):
        if not any(value == neutral and type(value) is type(neutral) for neutral in FIELDS[name].neutral):
            with pytest.raises(ApiError, match=f"'{name}' is ") as raised:
                refuse_unsupported({name: value})
            assert raised.value.param == name


@pytest.mark.parametrize("fields", [{"presence_penalty": 0.0}, {"n": 1.0}, {"tools": [{}], "tool_choice": "none"}])
def test_equal_numbers_and_tools_that_are_not_to_be_called_are_accepted(fields: dict[str, Any]) -> None:
    refuse_unsupported(fields)


def test_true_is_not_one() -> None:
    with pytest.raises(ApiError, match="'n' is true"):
        refuse_unsupported({"n": True})
    with pytest.raises(ApiError, match="'tools'"):
        refuse_unsupported({"tools": "all", "tool_choice": "none"})


def test_the_message_says_what_to_use() -> None:
    with pytest.raises(ApiError, match="use 'repetition_penalty'"):
        refuse_unsupported({"repeat_penalty": 1.3})
