"""Turns neighbours into a distribution over tasks and cuts it to its nucleus; pure functions.

The rule is that of arXiv 2602.21222: w_t is proportional to the sum, over the neighbours of task t, of
exp(-(1 - cos) / T); the smallest set of tasks whose shares reach p is kept and renormalised.
The paper has T = 1, which is nearly a vote count.

Beyond the paper: votes divided by a power of the task's number of examples, so that a small task is not drowned; the
top task alone once its share is high enough; no task at all when no share is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from edgecompose.errors import RetrievalError
from edgecompose.retrieval.index import Neighbour
from edgecompose.settings import RetrievalSettings

#: Rounding slack of the cumulative sum: shares 0.5 + 0.4 reach p = 0.9.
_SLACK = 1e-9


def weigh(
    neighbours: Sequence[Neighbour], settings: RetrievalSettings, sizes: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, float]]:
    """The distribution over tasks, and what is kept of it, renormalised; nothing where no task stands out.

    Args:
        sizes: number of examples of each task.

    Raises:
        RetrievalError: no neighbour, or a setting out of range.
    """
    power = settings.class_size_exponent
    priors = {task: size**power for task, size in sizes.items()} if power else {}
    distribution = task_distribution(neighbours, settings.routing_temperature, priors)
    top, share = next(iter(distribution.items()))
    if share < settings.fallback:
        return distribution, {}
    if share >= settings.shortcut:
        return distribution, {top: 1.0}
    return distribution, nucleus(distribution, settings.nucleus)


def task_distribution(
    neighbours: Sequence[Neighbour], temperature: float, priors: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Share of each task among the neighbours, largest first; the shares sum to 1.

    Args:
        neighbours: at least one.
        temperature: T > 0, dimensionless; the smaller, the more the nearest count.
        priors: what a task's votes are divided by, > 0; 1 for tasks that it lacks.

    Raises:
        RetrievalError: no neighbour, or a temperature that is not a positive number.
    """
    if not neighbours:
        raise RetrievalError("no neighbour was found, so no task can be weighed")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise RetrievalError(f"routing_temperature is {temperature}; expected a number above 0")
    nearest = max(n.similarity for n in neighbours)
    scores: dict[str, float] = {}
    for neighbour in neighbours:
        # relative to the nearest: the same ratios, and no underflow at a low temperature
        score = math.exp((neighbour.similarity - nearest) / temperature)
        scores[neighbour.task] = scores.get(neighbour.task, 0.0) + score / (priors or {}).get(neighbour.task, 1.0)
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
        raise RetrievalError(f"nucleus is {p}; expected a number in (0, 1]")
    likely: dict[str, float] = {}
    reached = 0.0
    for task, share in sorted(distribution.items(), key=_order):
        if p < 1 and reached >= p - _SLACK:
            break
        likely[task] = share
        reached += share
    return _normalized(likely)


def adapter_weights(
    tasks: Mapping[str, float], adapters_of: Mapping[str, Mapping[str, float]], *, excluded: Collection[str] = ()
) -> dict[str, float]:
    """Weights of adapters, largest first, from weights of tasks; tasks that share an adapter add up.

    Args:
        adapters_of: adapter -> weight of each task; a task without any leaves its share to the base.
        excluded: adapters that get nothing; the task's other adapters take their part of its share, or else the base.
    """
    weights: dict[str, float] = {}
    for task, weight in tasks.items():
        allowed = {name: part for name, part in adapters_of[task].items() if name not in excluded}
        left = math.fsum(allowed.values())
        grown = math.fsum(adapters_of[task].values()) / left if left > 0 else 1.0
        for adapter, part in allowed.items():
            weights[adapter] = weights.get(adapter, 0.0) + weight * part * grown
    return dict(sorted(weights.items(), key=_order))


def _normalized(scores: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(scores.values())
    return {task: score / total for task, score in sorted(scores.items(), key=_order)}


def _order(item: tuple[str, float]) -> tuple[float, str]:
    return -item[1], item[0]
