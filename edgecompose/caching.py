"""Values by name, up to a number of bytes: the one cache of this package."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class LruCache(Generic[T]):
    """Values by name, the least recently used ones dropped beyond a number of bytes; safe between threads.

    The last one is kept whatever its size, unless the number is 0.
    """

    def __init__(self, limit_bytes: int, size_of: Callable[[T], int]) -> None:
        self.limit_bytes, self._size_of = limit_bytes, size_of
        self._entries: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> T | None:
        """The value of that name, which becomes the most recently used."""
        with self._lock:
            if name not in self._entries:
                return None
            self._entries.move_to_end(name)
            return self._entries[name]

    def put(self, name: str, value: T) -> None:
        """Keep a value, and drop others that leave it no room."""
        with self._lock:
            self._remove(name)
            if not self.limit_bytes:
                return
            self._entries[name] = value
            self.bytes += self._size_of(value)
            while self.bytes > self.limit_bytes and len(self._entries) > 1:
                self._remove(next(iter(self._entries)))

    def make_room(self, size: int) -> None:
        """Drop the least recently used values until `size` more bytes would fit, or nothing is left."""
        with self._lock:
            while self._entries and self.bytes + size > self.limit_bytes:
                self._remove(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0

    def _remove(self, name: str) -> None:
        value = self._entries.pop(name, None)
        if value is not None:
            self.bytes -= self._size_of(value)
