"""Buffers that are used again, and the cache of blends."""

from __future__ import annotations

import pytest

from edgecompose.engine.device import choose_device
from edgecompose.engine.memory import BufferPool


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(choose_device("cpu"), idle_bytes=8000)


def test_a_buffer_that_fits_is_used_again(pool: BufferPool) -> None:
    first = pool.take(1000)
    pool.give(first)
    assert pool.take(600) is first


@pytest.mark.parametrize("expected", [1001, 499])
def test_a_buffer_too_small_or_much_too_large_is_not(pool: BufferPool, expected: int) -> None:
    first = pool.take(1000)
    pool.give(first)
    other = pool.take(expected)
    assert other is not first
    assert other.shape() == [expected]


def test_the_smallest_that_fits_is_taken(pool: BufferPool) -> None:
    large, small = pool.take(1000), pool.take(800)
    pool.give(large)
    pool.give(small)
    assert pool.take(700) is small


def test_idle_buffers_are_limited(pool: BufferPool) -> None:
    buffers = [pool.take(1000) for _ in range(3)]
    for buffer in buffers:
        pool.give(buffer)
    again = [pool.take(1000) for _ in range(3)]
    assert [b is a for b, a in zip(again, buffers[1:], strict=False)] == [True, True]
    assert again[2] is not buffers[0]
