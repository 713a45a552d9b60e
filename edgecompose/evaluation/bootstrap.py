"""Bootstrap intervals of accuracies and of paired differences (Efron and Tibshirani, 1993)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecompose.errors import EvaluationError

Bools = npt.NDArray[np.bool_]
Double = npt.NDArray[np.float64]
Interval = tuple[float, float]
#: Resamples of a bootstrap, and the percentiles that bound an interval of 95 %.
RESAMPLES = 2000
_BOUNDS = (2.5, 97.5)
#: Values that a bootstrap draws at a time.
_DRAWN_AT_ONCE = 4 << 20


def bootstrap_interval(right: Bools, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """95 % percentile bootstrap interval of an accuracy.

    The interval has no width where all are right or all are wrong.

    Args:
        right: (n,), at least one.
    """
    return mean_interval([right], seed, resamples)


def mean_interval(right: Sequence[Bools], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """95 % interval of the mean over tasks of their accuracies, each task resampled within itself.

    Args:
        right: one array (n of the task,) a task, at least one each.
    """
    return _bounds(_resampled_mean([task.astype(np.float64) for task in right], seed, resamples))


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """A difference of two means over tasks, its 95 % interval, and the share of resamples in which it is above 0."""

    difference: float
    ci95: Interval
    wins: float


def paired_bootstrap(
    one: Sequence[Bools], other: Sequence[Bools], seed: int = 0, resamples: int = RESAMPLES
) -> PairedDifference:
    """Compare two variants that answered the same examples; an example is drawn with both of its results.

    Args:
        one, other: an array (n of the task,) for each task, in the same order.

    Raises:
        EvaluationError: not the same examples, or none.
    """
    if [len(task) for task in one] != [len(task) for task in other]:
        raise EvaluationError("a paired comparison got different numbers of examples; expected the same examples")
    differences = [a.astype(np.float64) - b.astype(np.float64) for a, b in zip(one, other, strict=True)]
    drawn = _resampled_mean(differences, seed, resamples)
    return PairedDifference(_mean(differences), _bounds(drawn), float((drawn > 0).mean()))


def _mean(tasks: Sequence[Double]) -> float:
    return float(np.mean([task.mean() for task in tasks]))


def _bounds(drawn: Double) -> Interval:
    low, high = np.percentile(drawn, _BOUNDS)
    return float(low), float(high)


def _resampled_mean(tasks: Sequence[Double], seed: int, resamples: int) -> Double:
    """(resamples,) means over tasks, every task drawn anew with replacement."""
    if not tasks or not all(len(task) for task in tasks):
        raise EvaluationError("an interval needs at least one example of each task, got none")
    rng = np.random.default_rng(seed)
    return np.asarray(np.mean([_task_means(task, rng, resamples) for task in tasks], axis=0), np.float64)


def _task_means(values: Double, rng: np.random.Generator, resamples: int) -> Double:
    rows = max(1, _DRAWN_AT_ONCE // len(values))
    sizes = (min(rows, resamples - start) for start in range(0, resamples, rows))
    drawn = [values[rng.integers(len(values), size=(size, len(values)), dtype=np.int32)].mean(axis=1) for size in sizes]
    return np.concatenate(drawn)
