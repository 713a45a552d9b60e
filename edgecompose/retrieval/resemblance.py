"""How much a prompt resembles the examples of a task, relative to how much these resemble each other.

Cosines alone do not tell: they depend on how alike the examples of a task are. Of the nearest examples of a prompt, the
similarities of those of one task are added up; the result is divided by what is typical of that task, the median over
its own examples, each looked up without itself and its nearest siblings: examples that were made from one text, or one
text in several wordings. So 1 is that of a new example of the task, whatever the task is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import TaskSpec
from edgecompose.errors import RetrievalError
from edgecompose.guard.native import native
from edgecompose.retrieval.index import EXACT_BELOW, Neighbour, vectors_of

if TYPE_CHECKING:
    from usearch.index import Index

#: How many of the nearest examples count, and how many examples of a task are looked up.
_NEAREST, _SAMPLE = 20, 64
#: Siblings that an example may have; in a small task one for so many examples.
_SIBLINGS, _PER_SIBLING = 5, 4


def resemblance(neighbours: Sequence[Neighbour], typical: Mapping[str, float]) -> float | None:
    """The largest over tasks; None where no task of the nearest examples has a typical similarity.

    Args:
        neighbours: most similar first.
        typical: similarity that is typical of each task, > 0; tasks without one do not count.
    """
    nearest = neighbours[:_NEAREST]
    sums: dict[str, float] = {}
    for neighbour in nearest:
        if neighbour.task in typical:
            sums[neighbour.task] = sums.get(neighbour.task, 0.0) + max(neighbour.similarity, 0.0)
    return max((total / len(nearest) / typical[task] for task, total in sums.items()), default=None)


def typical_similarities(index: Index, tasks: Mapping[str, TaskSpec]) -> dict[str, float]:
    """What is typical of each task; tasks whose examples are not alike have none.

    Args:
        index: an editable one, which gives vectors by key.
    """
    spans = sorted((task.first_key, task.first_key + task.examples, name) for name, task in tasks.items())
    starts = np.array([start for start, _, _ in spans], np.int64)
    typical = {}
    for position, (start, end, name) in enumerate(spans):
        keys = np.unique(np.linspace(start, end - 1, min(_SAMPLE, end - start)).astype(np.uint64))
        if len(keys):
            siblings = min(_SIBLINGS, (end - start - 1) // _PER_SIBLING)
            own = _own_similarities(index, keys, starts, position=position, siblings=siblings)
            median = float(np.median(own))
            if median > 0:
                typical[name] = median
    return typical


def _own_similarities(
    index: Index, keys: npt.NDArray[np.uint64], starts: npt.NDArray[np.int64], *, position: int, siblings: int
) -> list[float]:
    """The mean over the nearest examples of each of some examples, those of other tasks counting 0."""
    count = _NEAREST + siblings + 1
    vectors = vectors_of(index, keys)
    similarities = []
    for key, vector in zip(keys, vectors, strict=True):
        with native(RetrievalError, "the index cannot be searched"):
            matches = index.search(vector, count, exact=len(index) <= EXACT_BELOW, threads=1)
        others = matches.keys != key
        tasks = np.searchsorted(starts, matches.keys[others].astype(np.int64), side="right") - 1
        cosines = np.clip(1 - matches.distances[others], 0, 1)[siblings:][:_NEAREST]
        own = cosines[tasks[siblings:][:_NEAREST] == position]
        similarities.append(float(own.sum() / max(1, len(cosines))))
    return similarities
