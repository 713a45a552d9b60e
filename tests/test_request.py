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
        ({"drafts": 9}, "drafts is 9; expected an integer in 0 to 8"),
        ({"drafts": -1}, "drafts is -1; expected an integer in 0 to 8"),
        ({"drafts": True}, "drafts is True; expected an integer in 0 to 8"),
        ({"drafts": "many"}, "drafts is 'many'; expected an integer in 0 to 8"),
        ({"drafts": 2.0}, "drafts is 2.0; expected an integer in 0 to 8"),
        ({"drafts": 2.5}, "drafts is 2.5; expected an integer in 0 to 8"),
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
