"""Caches: the least recently used values, and parts that are loaded when first needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from edgecompose.caching import LruCache


def cache() -> LruCache[bytes]:
    return LruCache(10, len)


def test_the_least_recently_used_goes_first() -> None:
    remaining = cache()
    for name in "abc":
        remaining.put(name, b"123")
    assert remaining.get("a") == b"123"
    remaining.put("d", b"123")
    assert [remaining.get(name) is not None for name in "abcd"] == [True, False, True, True]
    assert (remaining.bytes, len(remaining)) == (9, 3)


def test_a_value_is_replaced_and_a_large_one_kept_alone() -> None:
    remaining = cache()
    remaining.put("a", b"123")
    remaining.put("a", b"12345")
    assert (remaining.get("a"), remaining.bytes) == (b"12345", 5)
    remaining.put("b", bytes(11))
    assert (remaining.get("a"), remaining.get("b"), remaining.bytes) == (None, bytes(11), 11)
    remaining.put("c", b"1")
    assert (remaining.get("b"), remaining.get("c")) == (None, b"1")
    none: LruCache[bytes] = LruCache(0, len)
    none.put("a", b"1")
    assert none.get("a") is None
    remaining.clear()
    assert (remaining.get("a"), remaining.bytes, len(remaining)) == (None, 0, 0)


def test_room_is_made_before_a_value_is_there() -> None:
    remaining = cache()
    for name in "abc":
        remaining.put(name, b"123")
    remaining.make_room(4)
    assert [remaining.get(name) is not None for name in "abc"] == [False, True, True]
    remaining.make_room(11)
    assert (len(remaining), remaining.bytes) == (0, 0)


def test_threads_do_not_disturb_the_count() -> None:
    remaining: LruCache[bytes] = LruCache(500, len)

    def work(seed: int) -> None:
        for i in range(300):
            remaining.put(str((seed * 7 + i) % 40), bytes(1 + (seed + i) % 30))
            remaining.get(str(i % 40))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert 0 <= remaining.bytes <= 500
    result = [remaining.get(str(i)) for i in range(40)]
    assert remaining.bytes == sum(len(value) for value in result if value is not None)
