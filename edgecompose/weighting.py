"""Neighbours to a distribution over tasks, and its nucleus; pure functions, knows nothing of files.

The rule is that of arXiv 2602.21222: w_t is proportional to the sum, over the neighbours of task t, of
exp(-(1 - cos) / T); the smallest set of tasks whose shares reach p is kept and renormalised.
The paper has T = 1, which is nearly a vote count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgecompose.errors import RetrievalError
from edgecompose.retrieval import Neighbour

#: Rounding slack of the cumulative sum: shares 0.5 + 0.4 reach p = 0.9.
_SLACK = 1e-9


def task_distribution(neighbours: Sequence[Neighbour], temperature: float) -> dict[str, float]:
    """Share of each task among the neighbours, largest first; the shares sum to 1.

    Args:
        neighbours: at least one.
        temperature: T > 0, dimensionless; the smaller, the more the nearest count.

    Raises:
        RetrievalError: no neighbour, or a temperature that is not a positive number.
    """
    if not neighbours:
        raise RetrievalError("no neighbour was found, so no task can be weighed")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise RetrievalError(f"temperature is {temperature}; a positive number is wanted")
    nearest = max(n.similarity for n in neighbours)
    scores: dict[str, float] = {}
    for neighbour in neighbours:
        # relative to the nearest: the same ratios, and no underflow at a low temperature
        score = math.exp((neighbour.similarity - nearest) / temperature)
        scores[neighbour.task] = scores.get(neighbour.task, 0.0) + score
    return _normalized(scores)


def nucleus(distribution: Mapping[str, float], p: float) -> dict[str, float]:
    """The fewest tasks whose shares sum to at least p, renormalised to sum 1, largest first.

    Args:
        distribution: shares that sum to 1, in any order.
        p: in (0, 1]; 1 keeps every task.

    Raises:
        RetrievalError: an empty distribution, or p outside (0, 1].
    """
    if not distribution:
        raise RetrievalError("an empty distribution has no nucleus")
    if not 0 < p <= 1:
        raise RetrievalError(f"top-p is {p}; a number in (0, 1] is wanted")
    kept: dict[str, float] = {}
    reached = 0.0
    for task, share in sorted(distribution.items(), key=_order):
        if p < 1 and reached >= p - _SLACK:
            break
        kept[task] = share
        reached += share
    return _normalized(kept)


def adapter_weights(tasks: Mapping[str, float], adapter_of: Mapping[str, str]) -> dict[str, float]:
    """Weights of adapters from weights of tasks; tasks that share an adapter add up."""
    weights: dict[str, float] = {}
    for task, weight in tasks.items():
        weights[adapter_of[task]] = weights.get(adapter_of[task], 0.0) + weight
    return dict(sorted(weights.items(), key=_order))


def _normalized(scores: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(scores.values())
    return {task: score / total for task, score in sorted(scores.items(), key=_order)}


def _order(item: tuple[str, float]) -> tuple[float, str]:
    return -item[1], item[0]
