"""Settings: what is out of range or unknown is refused, and the bundle's hold where nothing is said."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from edgecompose import EdgeComposeError, MergeSettings, RetrievalSettings, Sampling
from edgecompose.errors import GenerationError, MergeError, RetrievalError
from edgecompose.settings import names_of, override, settings_of


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -1.0),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", np.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", np.inf),
        ("repetition_penalty", np.nan),
        ("temperature", np.inf),
        ("temperature", np.nan),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", np.nan),
        ("seed", -1),
    ],
)
def test_bad_sampling_settings_are_refused(setting: str, value: float) -> None:
    with pytest.raises(GenerationError, match="expected"):
        Sampling(**{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [RetrievalSettings, MergeSettings, Sampling])
def test_every_setting_has_help_and_a_default_in_its_range(kind: type[Any]) -> None:
    kind()
    for name, item in settings_of(kind).items():
        assert item.help.endswith("."), name
        for bound in (item.low, item.high):
            if bound is not None:
                dataclasses.replace(kind(), **{name: bound})
        for outside in (
            item.above,
            None if item.low is None else item.low - 1,
            None if item.high is None else 1 + item.high,
        ):
            if outside is not None:
                with pytest.raises(EdgeComposeError, match=f"{name} is .*; expected"):
                    dataclasses.replace(kind(), **{name: outside})
        if item.range:
            with pytest.raises(EdgeComposeError, match=f"{name} is 'x'; expected"):
                dataclasses.replace(kind(), **{name: "x"})


def test_a_mapping_changes_some_settings_and_an_object_replaces_all() -> None:
    defaults = RetrievalSettings(neighbours=7, nucleus=0.5)
    assert override(defaults, None, RetrievalError) is defaults
    assert override(defaults, {"neighbours": 3}, RetrievalError) == RetrievalSettings(neighbours=3, nucleus=0.5)
    assert override(defaults, RetrievalSettings(neighbours=3), RetrievalError) == RetrievalSettings(neighbours=3)
    with pytest.raises(RetrievalError, match="settings temperature are unknown; expected some of neighbours"):
        override(defaults, {"temperature": 3}, RetrievalError)
    with pytest.raises(RetrievalError, match="neighbours is 0"):
        override(defaults, {"neighbours": 0}, RetrievalError)
    with pytest.raises(MergeError, match="majority_sign is 'most'"):
        override(MergeSettings(), {"majority_sign": "most"}, MergeError)
    assert names_of(Sampling)[:2] == ("temperature", "top_p")
