"""Times of one variant over rounds, and rates of several variants that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

Step = Callable[[], object]
#: A call that handles the tokens of a round, and returns the seconds that they took.
TimedStep = Callable[[], float]
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds a round."""

    least: float
    median: float


def elapsed_ms(start: float) -> float:
    """Milliseconds since `start`, a value of `time.perf_counter`."""
    return (time.perf_counter() - start) * 1e3


def time_rounds(run: Step, rounds: int, *, warm_up: int = WARM_UP) -> Timing:
    """Time a call that returns only when the device is done; ONNX Runtime synchronises at the end of each run."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(elapsed_ms(start))
    return Timing(min(times), statistics.median(times))


def rates_in_turns(
    variants: Mapping[str, Step],
    *,
    tokens: int,
    rounds: int,
    calls: int = 1,
    untimed_calls: int = 0,
    warm_up: int = 0,
    timed: Mapping[str, TimedStep] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Tokens a second of each variant in each round; all variants run once a round, so they see the same machine.

    Args:
        timed: more variants, whose programs read the prompt in each call and so measure their seconds themselves.
        tokens: that the timed calls of a round handle together.
        calls: timed calls of a variant in a round.
        untimed_calls: calls before those.
        warm_up: rounds that are not counted.
    """
    rates: dict[str, list[float]] = {name: [] for name in [*variants, *timed]}
    for turn in range(warm_up + rounds):
        for name, step in variants.items():
            for _ in range(untimed_calls):
                step()
            start = time.perf_counter()
            for _ in range(calls):
                step()
            elapsed = time.perf_counter() - start
            if turn >= warm_up:
                rates[name].append(tokens / elapsed)
        for name, measure in timed.items():
            elapsed = measure()
            if turn >= warm_up:
                rates[name].append(tokens / elapsed)
    return rates


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios within a round, where both saw the same machine."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median by name."""
    return {name: statistics.median(row) for name, row in values.items()}
