"""Times of stages add up."""

from __future__ import annotations

import time
from collections.abc import Generator

import pytest

from edgecompose.timing import STAGES, Timings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test sets its only entry."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_stage_adds_up_and_counts_what_fails(clock: list[float]) -> None:
    timings = Timings()
    assert timings.elapsed_ms == dict.fromkeys(STAGES, 0.0)
    with timings.stage("merge"):
        clock[0] += 0.25
    with pytest.raises(KeyError), timings.stage("merge"):
        clock[0] += 0.5
        raise KeyError
    assert timings.elapsed_ms == {**dict.fromkeys(STAGES, 0.0), "merge": 750.0}


def test_each_item_counts_until_it_comes(clock: list[float]) -> None:
    closed = []

    def items() -> Generator[int, None, None]:
        try:
            for number in range(3):
                clock[0] += 1
                yield number
        finally:
            closed.append(True)

    timings = Timings()
    for number in timings.each(items(), "decode"):
        clock[0] += 100  # the reader's time
        if number == 1:
            break
    assert timings.elapsed_ms["decode"] == 2000
    assert list(timings.each(items(), "total")) == [0, 1, 2]
    assert (timings.elapsed_ms["total"], len(closed)) == (3000, 2)
