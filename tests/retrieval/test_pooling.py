"""Poolings, and both ends of a text."""

from __future__ import annotations

import numpy as np
import pytest

from edgecompose.errors import BundleError
from edgecompose.retrieval.pooling import POOLINGS, pool, pooling_of


def test_pooling() -> None:
    hidden = np.array([[1, 2], [3, 6], [5, 1]], np.float32)
    assert np.array_equal(pool(hidden, POOLINGS["mean"]), [[3, 3]])
    assert np.array_equal(pool(hidden, POOLINGS["cls"]), [[1, 2]])
    assert np.array_equal(pool(hidden, POOLINGS["max"]), [[5, 6]])
    assert pool(hidden, POOLINGS["mean"])[0].dtype == np.float32


def test_a_pooling_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(BundleError, match=f"pools by 'median', expected one of {', '.join(POOLINGS)}"):
        pooling_of("median")


@pytest.mark.parametrize(("ends", "first", "last"), [(1, [1, 2], [5, 1]), (2, [2, 4], [4, 3.5]), (9, [3, 3], [3, 3])])
def test_both_ends_are_pooled_once_more(ends: int, first: list[float], last: list[float]) -> None:
    hidden = np.array([[1, 2], [3, 6], [5, 1]], np.float32)
    assert np.array_equal(pool(hidden, POOLINGS["mean"], ends), np.array([[3, 3], first, last]))
