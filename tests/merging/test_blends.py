"""Blends of a bundle's adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Composer, MergeSettings, Request, open_bundle
from tests.generation.models import PROMPTS


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


def test_one_adapter_is_one_blend_under_every_method_that_leaves_it_alone(opened: Composer) -> None:
    def composed(method: str, names: tuple[str, ...]) -> tuple[str, int]:
        weights = dict.fromkeys(names, 0.5)
        composition = opened.compose(PROMPTS[0], Request(weights=weights, merge=MergeSettings(method)))
        return composition.merged.digest, id(composition.merged)

    for methods in (("linear", "ties", "magnitude_prune", "dare_ties", "dare_linear"), ("product", "cat", "core_ties")):
        assert len({composed(method, ("animals",)) for method in methods}) == 1
        assert len({composed(method, ("animals", "colours")) for method in methods}) >= 2
    assert len({composed(method, ()) for method in ("linear", "ties", "svd", "product")}) == 1
