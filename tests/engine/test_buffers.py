"""Buffers that are used again, and the cache of blends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from edgecompose.caching import LruCache
from edgecompose.engine.buffers import BufferPool
from edgecompose.engine.device import choose_device


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(choose_device("cpu"), idle_bytes=8000)


def test_a_buffer_that_fits_is_used_again(pool: BufferPool) -> None:
    first = pool.take(1000)
    pool.give(first)
    assert pool.take(600) is first


@pytest.mark.parametrize("wanted", [1001, 499])
def test_a_buffer_too_small_or_much_too_large_is_not(pool: BufferPool, wanted: int) -> None:
    first = pool.take(1000)
    pool.give(first)
    other = pool.take(wanted)
    assert other is not first
    assert other.shape() == [wanted]


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


def cache() -> LruCache[bytes]:
    return LruCache(10, len)


def test_the_least_recently_used_goes_first() -> None:
    kept = cache()
    for name in "abc":
        kept.put(name, b"123")
    assert kept.get("a") == b"123"
    kept.put("d", b"123")
    assert [kept.get(name) is not None for name in "abcd"] == [True, False, True, True]
    assert (kept.bytes, len(kept)) == (9, 3)


def test_a_value_is_replaced_and_a_large_one_kept_alone() -> None:
    kept = cache()
    kept.put("a", b"123")
    kept.put("a", b"12345")
    assert (kept.get("a"), kept.bytes) == (b"12345", 5)
    kept.put("b", bytes(11))
    assert (kept.get("a"), kept.get("b"), kept.bytes) == (None, bytes(11), 11)
    kept.put("c", b"1")
    assert (kept.get("b"), kept.get("c")) == (None, b"1")
    none: LruCache[bytes] = LruCache(0, len)
    none.put("a", b"1")
    assert none.get("a") is None
    kept.clear()
    assert (kept.get("a"), kept.bytes, len(kept)) == (None, 0, 0)


def test_room_is_made_before_a_value_is_there() -> None:
    kept = cache()
    for name in "abc":
        kept.put(name, b"123")
    kept.make_room(4)
    assert [kept.get(name) is not None for name in "abc"] == [False, True, True]
    kept.make_room(11)
    assert (len(kept), kept.bytes) == (0, 0)


def test_threads_do_not_disturb_the_count() -> None:
    kept: LruCache[bytes] = LruCache(500, len)

    def work(seed: int) -> None:
        for i in range(300):
            kept.put(str((seed * 7 + i) % 40), bytes(1 + (seed + i) % 30))
            kept.get(str(i % 40))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert 0 <= kept.bytes <= 500
    found = [kept.get(str(i)) for i in range(40)]
    assert kept.bytes == sum(len(value) for value in found if value is not None)
