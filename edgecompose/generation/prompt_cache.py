"""The prompt cache: complete sequences, reused by prompts with the same beginning."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from edgecompose.engine.decoder_state import DecoderState

#: Reading fewer tokens again is faster than a sequence is taken from the cache.
_FEWEST_COMMON = 16


class PromptCache:
    """The last `limit` sequences. Safe between threads; a sequence that was taken belongs to its taker."""

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._states: list[DecoderState] = []
        self._lock = threading.Lock()

    def take(self, composition: str, ids: Sequence[int]) -> DecoderState | None:
        """The sequence under the same blend that shares most tokens with `ids`, rewound to those; None where few.

        The last of `ids` is never reused, because its logits are needed.

        Args:
            composition: the content hash of the blend.
        """
        with self._lock:
            fitting = [state for state in self._states if state.composition == composition]
            longest = max(fitting, key=lambda state: common_prefix(state.tokens, ids), default=None)
            if longest is None or common_prefix(longest.tokens, ids) < _FEWEST_COMMON:
                return None
            self._states.remove(longest)
        longest.rewind(min(common_prefix(longest.tokens, ids), len(ids) - 1))
        return longest

    def put(self, state: DecoderState) -> None:
        """Store a sequence that is complete."""
        with self._lock:
            self._states = [state, *self._states][: self._limit]

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._states = []


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens at the beginning of two sequences that are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
