"""Requests refuse settings and values that do not exist or are out of range."""

from __future__ import annotations

from typing import Any

import pytest

from edgecompose import EdgeComposeError, MergeSettings, Request, Sampling
from edgecompose.settings import RetrievalSettings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"route_by": "middle"}, "route_by is 'middle'; expected last or first"),
        ({"overflow": "drop"}, "overflow is 'drop'; expected refuse or truncate"),
        ({"attachment": "fold"}, "attachment is 'fold'; expected attach or fuse"),
        ({"retrieval": {"neighbors": 3}}, "settings neighbors are unknown"),
        ({"retrieval": {"neighbours": 0}}, "neighbours is 0"),
        ({"merge": {"method": "average"}}, "merge method 'average' is unknown"),
        ({"merge": {"density": 2}}, "density is 2"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"max_tokens": 0}, "max_tokens is 0; expected 1 or more"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeComposeError, match=message):
        Request(**fields)


def test_settings_are_objects_or_mappings() -> None:
    assert Request().retrieval is None and Request().sampling is None
    request = Request(retrieval={"nucleus": 0.5}, merge=MergeSettings("svd", rank=2), sampling=Sampling(0))
    assert request == Request(retrieval={"nucleus": 0.5}, merge=MergeSettings("svd", rank=2), sampling=Sampling(0))
    assert request != Request(retrieval=RetrievalSettings(nucleus=0.5))
