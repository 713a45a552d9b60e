"""Decides which passes of a decoder run, one after another: sequences that write share one, prompts are read between.

Threads that want a pass queue up. One of them leads: it chooses what runs next and runs it for all whose turn it is.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgecompose.engine.decoding.batch import Batch, Writer
from edgecompose.engine.decoding.decoder_pass import Float
from edgecompose.engine.decoding.pass_costs import PassCosts

#: Sequences that write in one pass at most.
MOST_ROWS = 32
#: Time for reading while others write, as a multiple of theirs.
_READING = 3
#: How long the next pass waits for sequences that were in the last: a share of the time that it took, and seconds.
_PATIENCE, _LONGEST_WAIT = 0.25, 0.02


class QueuedSequence(Writer, Protocol):
    """A sequence whose passes are queued."""

    def run_alone(self, ids: Sequence[int], *, kept: int, together: bool) -> Float:
        """Run the graph once, on this sequence alone; the logits of the last `kept` tokens."""


@dataclass(slots=True, eq=False)
class _Job:
    """A pass that a thread waits for. `kept` of its tokens get logits; `reads` is true of a prompt's."""

    state: QueuedSequence
    ids: Sequence[int]
    kept: int
    reads: bool
    result: Float | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None


@dataclass(frozen=True, slots=True, eq=False)
class _Leaving:
    """A sequence that wants to leave the batch, and how many of its tokens it keeps."""

    state: QueuedSequence
    keep: int


class PassQueue:
    """The passes of one decoder. Safe between threads.

    While prompts are read and answers written, reading gets three quarters of the time: the sooner a sequence writes,
    the more share a pass. `costs` holds what passes that write took, by their number of tokens.

    Args:
        batch: where several sequences write in one pass; None runs each alone.
    """

    def __init__(self, batch: Batch | None) -> None:
        self._batch = batch
        self._condition = threading.Condition()
        self._jobs: list[_Job] = []
        self._leader: int | None = None  # the thread that runs passes
        self._leaving: list[_Leaving] = []
        self._writers: weakref.WeakSet[QueuedSequence] = weakref.WeakSet()
        self._active: weakref.WeakSet[QueuedSequence] = weakref.WeakSet()
        self._spent = {True: 0.0, False: 0.0}
        self._last_seconds = 0.0
        self.costs = PassCosts()

    def read(self, state: QueuedSequence, ids: Sequence[int], *, kept: int) -> Float:
        """Append a part of a prompt; the logits of its last `kept` tokens, overwritten by the state's next pass.

        Raises:
            GenerationError: memory does not suffice for the cache.
            BundleError: the graph fails on what it should take.
        """
        return self._result(_Job(state, ids, kept, reads=True))

    def write(self, state: QueuedSequence, ids: Sequence[int]) -> Float:
        """Append written tokens; the logits after each. Raises what `read` does."""
        return self._result(_Job(state, ids, len(ids), reads=False))

    def beside(self, state: QueuedSequence) -> int:
        """How many other sequences were written in the last pass."""
        with self._condition:
            return len(self._writers.difference((state,)))

    def leave(self, state: QueuedSequence, *, keep: int) -> None:
        """No longer write beside others: other passes do not wait for this sequence. Its first `keep` tokens stay.

        It leaves between two passes. A thread that runs them, and collects a sequence that nobody uses, does not wait.
        """
        with self._condition:
            self._writers.discard(state)
            self._active.discard(state)
            leaving = _Leaving(state, keep)
            self._leaving.append(leaving)
            self._condition.notify_all()
            if self._leader is None:
                self._let_leave()
            while leaving in self._leaving and self._leader != threading.get_ident():
                self._condition.wait()

    def _let_leave(self) -> None:
        """Take the sequences that want to leave out of the batch."""
        while self._leaving:
            leaving = self._leaving[0]
            if self._batch is not None:
                self._batch.leave(leaving.state, keep=leaving.keep)
            self._leaving.remove(leaving)
        self._condition.notify_all()

    def _result(self, job: _Job) -> Float:
        with self._condition:
            self._jobs.append(job)
            self._active.add(job.state)
            self._condition.notify_all()
        try:
            while not job.done:
                with self._condition:
                    if job.done:
                        break
                    if self._leader is not None:
                        self._condition.wait()
                        continue
                    self._leader = threading.get_ident()
                self._lead(job)
        except BaseException:  # Ctrl-C
            self._withdraw(job)
            raise
        if job.error is not None:
            raise job.error
        assert job.result is not None, "a job that is done has one of both"
        return job.result

    def _withdraw(self, job: _Job) -> None:
        """Take a job back, or wait until the thread that runs it has done it."""
        with self._condition:
            if job in self._jobs:
                self._jobs.remove(job)
            while self._leader is not None and not job.done:
                self._condition.wait()

    def _lead(self, job: _Job) -> None:
        """Run passes until a job is done, then let another thread lead."""
        chosen: list[_Job] = []
        try:
            while not job.done:
                chosen = self._choose()
                began = time.perf_counter()
                self._run(chosen)
                self._account(chosen, time.perf_counter() - began)
        finally:
            with self._condition:
                # after Ctrl-C in this thread: what it ran for others is still to be done
                self._jobs = [other for other in chosen if not other.done and other is not job] + self._jobs
                self._let_leave()
                self._leader = None
                self._condition.notify_all()

    def _choose(self) -> list[_Job]:
        """Take the jobs of the next pass out of the queue."""
        with self._condition:
            self._let_leave()
            self._await_writers()
            reads = [job for job in self._jobs if job.reads]
            writes = [job for job in self._jobs if not job.reads]
            if not reads or not writes:
                self._spent = {True: 0.0, False: 0.0}
            if reads and (not writes or self._spent[True] <= _READING * self._spent[False]):
                chosen = reads[:1]
            else:
                long = writes[0].state.is_long(len(writes[0].ids))
                chosen = [job for job in writes if job.state.is_long(len(job.ids)) == long][:MOST_ROWS]
            self._jobs = [job for job in self._jobs if job not in chosen]
            return chosen

    def _await_writers(self) -> None:
        """Give the sequences of the last pass the time to come back: one pass for all is cheaper than two."""
        deadline = time.perf_counter() + min(_PATIENCE * self._last_seconds, _LONGEST_WAIT)
        while missing := self._writers.difference(job.state for job in self._jobs):
            left = deadline - time.perf_counter()
            if left <= 0 or not self._condition.wait(left):
                self._writers.difference_update(missing)  # until they write again
                return

    def _account(self, jobs: Sequence[_Job], seconds: float) -> None:
        with self._condition:
            self._spent[jobs[0].reads] += seconds
            if not jobs[0].reads:
                self._last_seconds = seconds
                self.costs.add(len(jobs) * max(len(job.ids) for job in jobs), seconds)
                self._writers.update(job.state for job in jobs)
            self._condition.notify_all()

    def _run(self, jobs: Sequence[_Job]) -> None:
        batch = self._batch
        if not jobs[0].reads and batch is not None and (len(jobs) > 1 or jobs[0].state in batch):
            try:
                expected = min(len(self._active), MOST_ROWS)
                results = batch.write([(job.state, job.ids) for job in jobs], expected=expected)
            except Exception as error:
                if len(jobs) == 1:
                    jobs[0].error = error
                    return
                for job in jobs:  # of one that fails, the others know nothing
                    self._run([job])
                return
            for job, result in zip(jobs, results, strict=True):
                job.result = result
            return
        for job in jobs:
            try:
                job.result = job.state.run_alone(job.ids, kept=job.kept, together=job.reads)
            except Exception as error:
                job.error = error
