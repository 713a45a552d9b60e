"""Sequences that came to their end, kept for prompts that begin as they did."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from edgecompose.engine.decoder import Decoding

#: Fewer tokens in common are read again sooner than a sequence is taken from its keeper.
_WORTHWHILE = 16


class PrefixCache:
    """The last `limit` sequences. Safe between threads; a sequence that was taken belongs to its taker."""

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._kept: list[Decoding] = []
        self._lock = threading.Lock()

    def take(self, composition: str, ids: Sequence[int]) -> Decoding | None:
        """The sequence under the same blend that shares most tokens with `ids`, rewound to those; None where few.

        At least the last of `ids` is left to be read, as its logits are wanted.

        Args:
            composition: the content hash of the blend.
        """
        with self._lock:
            fits = [d for d in self._kept if d.composition == composition]
            found = max(fits, key=lambda d: common_prefix(d.tokens, ids), default=None)
            if found is None or common_prefix(found.tokens, ids) < _WORTHWHILE:
                return None
            self._kept.remove(found)
        found.rewind(min(common_prefix(found.tokens, ids), len(ids) - 1))
        return found

    def put(self, decoding: Decoding) -> None:
        """Keep a sequence that nobody writes any more."""
        with self._lock:
            self._kept = [decoding, *self._kept][: self._limit]

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept = []


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
