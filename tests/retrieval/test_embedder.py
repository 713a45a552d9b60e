"""The pure steps around the sentence encoder."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.retrieval.embedder import head_and_tail, normalize


@given(st.integers(0, 60), st.integers(1, 30))
def test_a_long_sequence_keeps_both_ends_and_exactly_the_limit(length: int, limit: int) -> None:
    ids = list(range(length))
    remaining = head_and_tail(ids, limit)
    assert len(remaining) == min(length, limit)
    head = limit // 2
    assert remaining == ids if length <= limit else remaining == ids[:head] + ids[length - limit + head :]


@pytest.mark.parametrize(
    ("limit", "remaining"), [(8, [0, 1, 2, 3, 16, 17, 18, 19]), (9, [0, 1, 2, 3, 15, 16, 17, 18, 19])]
)
def test_an_odd_limit_gives_the_tail_one_more(limit: int, remaining: list[int]) -> None:
    assert head_and_tail(list(range(20)), limit) == remaining


@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_normalizing_keeps_the_direction(length: float) -> None:
    vector = np.array([3, 0, -4], np.float32) * np.float32(length)
    assert normalize(vector) == pytest.approx([0.6, 0, -0.8], rel=1e-6)
    assert normalize(vector).dtype == np.float32


def test_a_zero_vector_stays_zero() -> None:
    assert normalize(np.zeros(3, np.float32)).tolist() == [0, 0, 0]
