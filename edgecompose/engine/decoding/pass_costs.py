"""What a pass of a decoder costs by its number of tokens, as measured while answers are written."""

from __future__ import annotations

import functools
import threading
from collections import deque
from itertools import pairwise
from statistics import median

#: Cost of passes of so many tokens relative to one token, where it was not measured: that of the demo's base on two
#: cores. Between them it is linear.
_PRIOR = {1: 1.0, 2: 1.12, 4: 1.47, 8: 2.15, 16: 3.55}
#: Measurements of one size that count, how few do not, and after how many passes they are forgotten: a machine that was
#: busy for a moment would otherwise keep longer passes from being tried again.
_WINDOW, _FEWEST, _FRESH = 15, 3, 512
#: Tokens of the largest pass that is measured.
_MOST = 72


class PassCosts:
    """Seconds of a pass by its number of tokens, those of all its sequences. Safe between threads.

    Medians of what was measured; sizes between two measured ones deviate from the prior as these do.
    """

    def __init__(self) -> None:
        self._measured: dict[int, deque[tuple[int, float]]] = {}
        self._passes = 0
        self._estimate: tuple[float, dict[int, float]] | None = None
        self._lock = threading.Lock()

    def __call__(self, tokens: int) -> float:
        """Cost of a pass of at least 1 token: seconds, or relative to one token while that was not measured."""
        with self._lock:
            if self._estimate is None:
                self._estimate = self._estimated()
            one, factors = self._estimate
        return one * _prior(tokens) * _between(min(tokens, _MOST), factors)

    def add(self, tokens: int, seconds: float) -> None:
        """Add what a pass took; larger ones than drafts make are left out."""
        if not 1 <= tokens <= _MOST or seconds <= 0:
            return
        with self._lock:
            self._passes += 1
            self._measured.setdefault(tokens, deque(maxlen=_WINDOW)).append((self._passes, seconds))
            self._estimate = None

    def _estimated(self) -> tuple[float, dict[int, float]]:
        """The cost of one token, and by how much other sizes exceed their prior, in order."""
        one = self._median(1)
        if one is None:
            return 1.0, {1: 1.0, _MOST: 1.0}
        factors = {1: 1.0}
        for tokens in sorted(self._measured):
            seconds = self._median(tokens)
            if seconds is not None:
                factors[tokens] = seconds / (one * _prior(tokens))
        factors.setdefault(_MOST, factors[max(factors)])
        return one, factors

    def _median(self, tokens: int) -> float | None:
        """Of the measurements of a size that still count; those of one token always do."""
        window = self._measured.get(tokens, ())
        seconds = [value for at, value in window if tokens == 1 or at > self._passes - _FRESH]
        return median(seconds) if len(seconds) >= _FEWEST else None


@functools.cache
def _prior(tokens: int) -> float:
    last, largest = list(_PRIOR)[-2:]
    if tokens > largest:  # as between the last two
        slope = (_PRIOR[largest] - _PRIOR[last]) / (largest - last)
        return _PRIOR[largest] + slope * (tokens - largest)
    return _between(tokens, _PRIOR)


def _between(place: int, values: dict[int, float]) -> float:
    """A value between those of two places, which are in order."""
    for low, high in pairwise(values):
        if low <= place <= high:
            share = (place - low) / (high - low)
            return values[low] * (1 - share) + values[high] * share
    raise AssertionError("a place is outside")  # pragma: no cover - the ends are among the values
