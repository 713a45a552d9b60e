"""Results of variants on examples, one by one and summed up with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgecompose.evaluation.bootstrap import (
    Bools,
    Interval,
    PairedDifference,
    bootstrap_interval,
    mean_interval,
    paired_bootstrap,
)
from edgecompose.evaluation.examples import EvalExample
from edgecompose.timing import STAGES

#: Bins of the reliability of the top share.
BINS = 10


@dataclass(frozen=True, slots=True)
class Result:
    """One variant's answer to one example, and how it was routed.

    `weights` are those of adapters; `top_task`, its `top_share` in [0, 1] and the cosine `similarity` of the nearest
    neighbour are None where nothing was retrieved. `own_task` tells whether retrieval could have found the example's
    own task: the bundle has it and it was not left out. `timings_ms` has an entry for every stage of STAGES: the
    variant's own retrieval, and the one computation of a blend's answer that variants may share.
    """

    example: EvalExample
    right: bool
    answer: str
    weights: Mapping[str, float]
    top_task: str | None
    top_share: float | None
    similarity: float | None
    own_task: bool
    timings_ms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy in [0, 1] over `n` examples with its 95 % interval."""

    n: int
    accuracy: float
    ci95: Interval


@dataclass(frozen=True, slots=True)
class Bin:
    """Examples whose top share lies in one tenth: how many, their mean top share, the share routed to their task."""

    n: int
    share: float
    right: float


@dataclass(frozen=True, slots=True)
class Routing:
    """Where retrieval led: `confusion[task][top task]` counts examples.

    `reliability` has BINS bins over the top share in [0, 1], of examples whose own task could be found; `error` is the
    expected calibration error, the mean distance between share and hits, None where there is no such example.
    """

    confusion: Mapping[str, Mapping[str, int]]
    reliability: tuple[Bin, ...]
    error: float | None


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one variant reached. `mean` is None where it had no example; `timings_ms` are means over examples.

    `weights[task][adapter]` is the mean weight over the task's examples.
    """

    tasks: Mapping[str, Score]
    mean: float | None
    ci95: Interval | None
    timings_ms: Mapping[str, float]
    weights: Mapping[str, Mapping[str, float]]
    routing: Routing


@dataclass(frozen=True, slots=True)
class Comparison:
    """The main variant against another over the tasks that both had: their means, and task by task."""

    paired: PairedDifference
    by_task: Mapping[str, PairedDifference]


@dataclass(frozen=True, slots=True)
class Summary:
    """Metrics by variant, and the main one against each of the others that it shares a task with."""

    main: str
    metrics: Mapping[str, Metrics]
    against: Mapping[str, Comparison]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results by variant, in the order of the examples; `main` is the variant that the others are held to."""

    main: str
    results: Mapping[str, tuple[Result, ...]]

    def summary(self) -> Summary:
        """What all of them reached."""
        others = {name: self.against(name) for name in self.results if name != self.main}
        return Summary(
            self.main,
            {name: self.metrics(name) for name in self.results},
            {name: comparison for name, comparison in others.items() if comparison is not None},
        )

    def metrics(self, name: str) -> Metrics:
        """The metrics of one variant."""
        results = self.results[name]
        right = _right(results)
        tasks = {t: Score(len(r), float(r.mean()), bootstrap_interval(r)) for t, r in right.items()}
        return Metrics(
            tasks,
            float(np.mean([score.accuracy for score in tasks.values()])) if tasks else None,
            mean_interval(list(right.values())) if tasks else None,
            {stage: float(np.mean([j.timings_ms[stage] for j in results])) if results else 0.0 for stage in STAGES},
            {task: _mean_weights(task_results) for task, task_results in _by_task(results).items()},
            routing(results),
        )

    def against(self, name: str) -> Comparison | None:
        """The main variant against another, example by example; None where they share no task."""
        one, other = _right(self.results[self.main]), _right(self.results[name])
        shared = [task for task in one if task in other]
        if not shared:
            return None
        return Comparison(
            paired_bootstrap([one[t] for t in shared], [other[t] for t in shared]),
            {t: paired_bootstrap([one[t]], [other[t]]) for t in shared},
        )

    def misses(self, count: int) -> list[Result]:
        """The first examples that the main variant got wrong."""
        return [result for result in self.results[self.main] if not result.right][:count]


def routing(results: Iterable[Result]) -> Routing:
    """Where retrieval led, and whether the top share can be trusted."""
    confusion: dict[str, Counter[str]] = {}
    pairs: list[tuple[float, bool]] = []
    for result in results:
        if result.top_task is None or result.top_share is None:
            continue
        confusion.setdefault(result.example.task, Counter())[result.top_task] += 1
        if result.own_task:
            pairs.append((result.top_share, result.top_task == result.example.task))
    bins = [_bin(pairs, number) for number in range(BINS)]
    error = sum(b.n * abs(b.share - b.right) for b in bins) / len(pairs) if pairs else None
    return Routing({task: dict(counts.most_common()) for task, counts in confusion.items()}, tuple(bins), error)


def _bin(pairs: Sequence[tuple[float, bool]], number: int) -> Bin:
    inside = [pair for pair in pairs if min(int(pair[0] * BINS), BINS - 1) == number]
    share, right = np.array(inside).reshape(-1, 2).mean(axis=0) if inside else (0.0, 0.0)
    return Bin(len(inside), float(share), float(right))


def _by_task(results: Iterable[Result]) -> dict[str, list[Result]]:
    tasks: dict[str, list[Result]] = {}
    for result in results:
        tasks.setdefault(result.example.task, []).append(result)
    return dict(sorted(tasks.items()))


def _right(results: Iterable[Result]) -> dict[str, Bools]:
    by_task = _by_task(results)
    return {task: np.array([result.right for result in task_results]) for task, task_results in by_task.items()}


def _mean_weights(results: Sequence[Result]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for result in results:
        total.update(result.weights)
    return {name: weight / len(results) for name, weight in total.most_common()}
