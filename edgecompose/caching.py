"""Caches: values by name up to a number of bytes, and parts that are loaded when first needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

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


class Lazy(Generic[T]):
    """A property that is computed when first read, by one thread, under its owner's lock `_loading`.

    `drop` on the owner makes it computed anew.
    """

    def __init__(self, load: Callable[[Any], T]) -> None:
        self._load, self.__doc__ = load, load.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        with instance._loading:
            if self._name not in vars(instance):
                vars(instance)[self._name] = self._load(instance)
            value: T = vars(instance)[self._name]
            return value


class LazyParts:
    """An owner of `Lazy` properties."""

    def __init__(self) -> None:
        self._loading = threading.RLock()

    def drop(self) -> None:
        """Drop every lazy part; each is loaded again when needed."""
        with self._loading:
            for name, part in vars(type(self)).items():
                if isinstance(part, Lazy):
                    vars(self).pop(name, None)
