"""Which passes run, and in what order: with a batch that computes nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from edgecompose.engine.decoding.pass_queue import MOST_ROWS, PassQueue
from edgecompose.errors import GenerationError


class State:
    """A sequence that notes its passes in a list of all."""

    def __init__(self, name: str, log: list[Any], seconds: float = 0.0) -> None:
        self.name, self.log, self.seconds = name, log, seconds
        self.tokens: list[int] = []
        self.fails: Exception | type[BaseException] | None = None
        self.long = False

    def run_alone(self, ids: Sequence[int], *, kept: int, together: bool) -> np.ndarray:
        time.sleep(self.seconds)
        self.log.append((self.name, "read" if together else "alone", tuple(ids)))
        if self.fails is not None:
            raise self.fails
        self.tokens += ids
        return np.full((kept, 1), float(ids[-1]))

    def is_long(self, count: int) -> bool:
        return self.long


class FakeBatch:
    """Notes who writes together."""

    def __init__(self, log: list[Any], seconds: float = 0.002) -> None:
        self.log, self.seconds, self.inside = log, seconds, set[int]()
        self.fails: Callable[[], BaseException | None] = lambda: None

    def __contains__(self, state: State) -> bool:
        return id(state) in self.inside

    def write(self, jobs: Sequence[tuple[State, Sequence[int]]], *, expected: int) -> list[np.ndarray]:
        assert expected >= len(jobs)
        time.sleep(self.seconds)
        if (error := self.fails()) is not None:
            raise error
        self.log.append(("batch", tuple(sorted(state.name for state, _ in jobs))))
        for state, ids in jobs:
            self.inside.add(id(state))
            state.tokens += ids
        return [np.full((len(ids), 1), float(ids[-1])) for _, ids in jobs]

    def leave(self, state: State, *, keep: int) -> None:
        self.inside.discard(id(state))


def write(queue: PassQueue, state: State, count: int) -> None:
    for token in range(count):
        assert queue.write(state, [token]).tolist() == [[token]]  # type: ignore[arg-type]
    queue.leave(state, keep=0)  # type: ignore[arg-type]


def run(*work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(len(work)) as threads:
        for future in [threads.submit(one) for one in work]:
            future.result(60)


def test_sequences_that_write_at_once_share_passes() -> None:
    log: list[Any] = []
    queue = PassQueue(FakeBatch(log, 0.01))  # type: ignore[arg-type]
    states = [State(str(number), log) for number in range(6)]
    run(*(lambda state=state: write(queue, state, 30) for state in states))
    assert all(state.tokens == list(range(30)) for state in states)
    whole = [entry for entry in log if entry == ("batch", tuple("012345"))]
    assert len(whole) >= 15, "most passes have all six"
    assert not queue._jobs and not queue._leader


def test_one_that_is_slow_to_come_back_does_not_hold_the_others_up() -> None:
    log: list[Any] = []
    queue = PassQueue(FakeBatch(log, 0.005))  # type: ignore[arg-type]
    quick, slow = State("quick", log), State("slow", log)

    def write_slowly() -> None:
        for token in range(4):
            queue.write(slow, [token])  # type: ignore[arg-type]
            time.sleep(0.25)

    began = time.perf_counter()
    run(lambda: write(queue, quick, 40), write_slowly)
    assert time.perf_counter() - began < 5
    assert ("quick", "alone", (39,)) in log or ("batch", ("quick",)) in log


def test_prompts_are_read_between_the_passes_of_those_that_write() -> None:
    log: list[Any] = []
    queue = PassQueue(FakeBatch(log, 0.004))  # type: ignore[arg-type]
    writer, readers = State("writer", log, 0.004), [State(f"reader{number}", log, 0.004) for number in range(2)]
    started = threading.Event()

    def read(state: State) -> None:
        started.wait()
        for token in range(10):
            queue.read(state, [token], kept=1)  # type: ignore[arg-type]

    def begin() -> None:
        queue.write(writer, [0])  # type: ignore[arg-type]
        started.set()
        write(queue, writer, 60)

    run(begin, *(lambda state=state: read(state) for state in readers))
    kinds = ["r" if "read" in entry else "w" for entry in log]
    between = "".join(kinds[kinds.index("r") : len(kinds) - kinds[::-1].index("w")])
    assert "r" * 12 not in between and between.count("w") >= 4, between
    order = [entry[0] for entry in log if "read" in entry]
    assert order.index("reader0") < 8 and order.index("reader1") < 8, "they take turns"


def test_an_error_is_that_of_the_sequence_that_it_befell() -> None:
    log: list[Any] = []
    batch = FakeBatch(log)
    queue = PassQueue(batch)  # type: ignore[arg-type]
    good, bad = State("good", log), State("bad", log)
    bad.fails = GenerationError("no room")
    batch.fails = lambda: GenerationError("no room")

    def fail() -> None:
        with pytest.raises(GenerationError, match="no room"):
            queue.write(bad, [1])  # type: ignore[arg-type]

    run(lambda: write(queue, good, 20), fail)
    assert good.tokens == list(range(20)) and not bad.tokens and not queue._leader


def test_ctrl_c_in_the_thread_that_leads_ends_only_its_own_pass() -> None:
    log: list[Any] = []
    batch = FakeBatch(log, 0.01)
    queue = PassQueue(batch)  # type: ignore[arg-type]
    first, second = State("first", log), State("second", log)
    interrupts = [KeyboardInterrupt()]
    write_pass = batch.write

    def interrupted(jobs: Any, **options: Any) -> Any:
        if len(jobs) == 2 and interrupts:
            raise interrupts.pop()
        return write_pass(jobs, **options)

    batch.write = interrupted  # type: ignore[method-assign]
    outcomes: list[str] = []

    def work(state: State) -> None:
        try:
            write(queue, state, 30)
            outcomes.append("done")
        except KeyboardInterrupt:
            queue.leave(state, keep=0)  # type: ignore[arg-type]
            outcomes.append("interrupted")

    run(lambda: work(first), lambda: work(second))
    assert sorted(outcomes) == ["done", "interrupted"] and not queue._jobs and not queue._leader


def test_one_that_is_collected_by_the_thread_that_runs_passes_leaves_without_waiting_for_itself() -> None:
    log: list[Any] = []
    batch = FakeBatch(log, 0.005)
    queue = PassQueue(batch)  # type: ignore[arg-type]
    states, dropped = [State(name, log) for name in ("a", "b")], State("dropped", log)
    write_pass = batch.write

    def collecting(jobs: Any, **options: Any) -> Any:
        queue.leave(dropped, keep=0)  # type: ignore[arg-type]
        return write_pass(jobs, **options)

    batch.write = collecting  # type: ignore[method-assign]
    batch.inside.add(id(dropped))
    run(*(lambda state=state: write(queue, state, 12) for state in states))
    assert not batch.inside and not queue._leaving and all(len(state.tokens) == 12 for state in states)


def test_one_that_leaves_waits_for_a_pass_and_not_for_the_end_of_all_others() -> None:
    log: list[Any] = []
    queue = PassQueue(FakeBatch(log, 0.02))  # type: ignore[arg-type]
    states, waited = [State(str(number), log) for number in range(6)], list[float]()

    def leave() -> None:
        time.sleep(0.1)
        for _ in range(5):
            began = time.perf_counter()
            queue.leave(State("other", log), keep=0)  # type: ignore[arg-type]
            waited.append(time.perf_counter() - began)

    run(leave, *(lambda state=state: write(queue, state, 40) for state in states))
    assert max(waited) < 0.5, "a pass takes 0.02 seconds, all of them 0.8 and more"


def test_no_pass_has_more_rows_than_it_may_and_nobody_waits_forever() -> None:
    log: list[Any] = []
    queue = PassQueue(FakeBatch(log, 0.003))  # type: ignore[arg-type]
    states = [State(f"{number:02}", log) for number in range(MOST_ROWS + 8)]
    run(*(lambda state=state: write(queue, state, 12) for state in states))
    assert all(len(state.tokens) == 12 for state in states)
    assert max(len(entry[1]) for entry in log if entry[0] == "batch") <= MOST_ROWS


def test_sequences_under_other_frequencies_write_in_passes_of_their_own() -> None:
    log: list[Any] = []
    queue = PassQueue(FakeBatch(log, 0.005))  # type: ignore[arg-type]
    states = [State(name, log) for name in ("a", "b", "c", "d")]
    states[1].long = states[3].long = True
    run(*(lambda state=state: write(queue, state, 12) for state in states))
    assert all(not (set("ac") & set(entry[1]) and set("bd") & set(entry[1])) for entry in log if entry[0] == "batch")


def test_a_queue_without_a_batch_runs_each_alone() -> None:
    log: list[Any] = []
    queue = PassQueue(None)
    states = [State(name, log) for name in ("a", "b")]
    run(*(lambda state=state: write(queue, state, 5) for state in states))
    assert {kind for _, kind, _ in log} == {"alone"} and len(log) == 10
