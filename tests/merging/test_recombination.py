"""Gram matrices of stacked rows, and what is cached for a set of adapters."""

from __future__ import annotations

import numpy as np
import pytest

from edgecompose.bundle.quantization import dequantize
from edgecompose.engine.device import choose_device
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from tests.merging.merged import WEIGHTS, deltas, make_adapters


def test_gram_matrices_are_those_of_the_factors(merger: Merger) -> None:
    """The exact norm of a sum comes from them: compare with the norm of the formed updates."""
    adapters = make_adapters((8, 4, 8, 4))
    products = merger.inner_products(adapters)
    for i, one in enumerate(adapters):
        update = {
            name: m.scaling[:, None, None] * dequantize(m.a).swapaxes(1, 2) @ dequantize(m.b)
            for name, m in one.modules.items()
        }
        norm = sum(float((values.astype(np.float64) ** 2).sum()) for values in update.values())
        assert products[i, i] == pytest.approx(norm, rel=1e-4)
    assert np.allclose(products, products.T)


@pytest.mark.parametrize("method", ["svd", "core_ties", "core_prune", "core_dare"])
def test_a_set_that_was_merged_before_gives_the_same_with_other_weights(method: str) -> None:
    settings = MergeSettings(method, rank=4) if method == "svd" else MergeSettings(method)
    adapters, weights = make_adapters((8, 8, 8)), WEIGHTS[:3]
    used, fresh = Merger(choose_device("cpu")), Merger(choose_device("cpu"))
    used.merge(adapters, weights[::-1], settings)
    again, anew = (deltas(merger.merge(adapters, weights, settings)) for merger in (used, fresh))
    assert set(again) == set(anew)
    for name in anew:
        assert np.array_equal(again[name], anew[name])
