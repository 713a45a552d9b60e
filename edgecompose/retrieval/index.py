"""Searches the nearest training examples of a vector in a USearch index."""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import IndexSpec, TaskSpec
from edgecompose.errors import RetrievalError, UnknownAdapter
from edgecompose.guard.native import native
from edgecompose.retrieval.index_file import check_index_file
from edgecompose.retrieval.whitening import Whitening

if TYPE_CHECKING:  # a blend by hand is answered without it, and it takes 14 MB
    from usearch.index import Index

Float = npt.NDArray[np.float32]
#: Up to so many vectors every one is compared; beyond, USearch's graph is walked.
EXACT_BELOW = 20_000
#: The graph of larger indexes: neighbours of a vector, and how widely is looked for them when vectors are added and
#: searched. Half as many neighbours miss 3 % of the nearest 100 of a million, these 0.01 % (benchmarks/retrieval.py).
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 32, 256, 192


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One retrieved training example; `similarity` is the cosine, in [-1, 1]."""

    task: str
    key: int
    similarity: float


class ExampleIndex:
    """The examples of a bundle. Safe between threads.

    Args:
        source: the index file, which is mapped, or its bytes; the caller has checked the hash.
        whitening: from the embedder's vectors to those of the index; None where they are the same.

    Raises:
        RetrievalError: the file is not what the manifest says.
    """

    def __init__(
        self, source: Path | bytes, spec: IndexSpec, tasks: Mapping[str, TaskSpec], whitening: Whitening | None = None
    ) -> None:
        self._tasks = dict(tasks)
        self._whitening = whitening
        self._dimension = spec.dimension if whitening is None else len(whitening.mean)
        spans = sorted((task.first_key, name) for name, task in tasks.items() if task.examples)
        self._starts = [start for start, _ in spans]
        self._names = [name for _, name in spans]
        self._source = source  # USearch does not keep bytes alive
        self._index = open_index(source, spec)
        self._lock = threading.Lock()  # USearch gives every search of one thread the same scratch memory

    def __len__(self) -> int:
        return len(self._index)

    def search(self, query: Float, count: int, *, exclude: Collection[str] = ()) -> list[Neighbour]:
        """The `count` most similar examples, most similar first; fewer when the index holds fewer.

        Args:
            query: (dimension of the embedder,), finite, not zero.
            exclude: tasks whose examples are passed over.

        Raises:
            RetrievalError: an unusable query, or nothing left to search.
            UnknownAdapter: `exclude` names a task that the bundle does not have.
        """
        if query.shape != (self._dimension,) or not np.isfinite(query).all() or not query.any():
            raise RetrievalError(
                f"a query of shape {query.shape} cannot be searched; "
                f"expected {self._dimension} finite numbers, not all zero"
            )
        unknown = sorted(set(exclude) - set(self._tasks))
        if unknown:
            raise UnknownAdapter(f"no task '{', '.join(unknown)}' in the bundle; it has: {', '.join(self._tasks)}")
        passed_over = sum(self._tasks[name].examples for name in set(exclude))
        searched = min(len(self._index), count + passed_over)
        if searched - passed_over < 1:
            raise RetrievalError("no example is left to search; exclude fewer tasks, or add examples to the bundle")
        unit = query / np.linalg.norm(query.astype(np.float64))  # float16 holds no long or short query
        if self._whitening is not None:
            unit = self._whitening(unit)
        compare_all = len(self._index) <= EXACT_BELOW
        with self._lock, native(RetrievalError, "the index cannot be searched"):
            matches = self._index.search(unit.astype(np.float32), searched, exact=compare_all, threads=1)
        if not np.isfinite(matches.distances).all():
            raise RetrievalError("the index holds a vector without a direction; export the bundle again")
        neighbours = (
            Neighbour(self._task_of(int(key)), int(key), float(np.clip(1 - distance, -1, 1)))
            for key, distance in zip(matches.keys, matches.distances, strict=True)
        )
        return [n for n in neighbours if n.task not in exclude][:count]

    def _task_of(self, key: int) -> str:
        name = self._names[max(0, bisect_right(self._starts, key) - 1)] if self._names else ""
        task = self._tasks.get(name)
        if task is None or not task.first_key <= key < task.first_key + task.examples:
            raise RetrievalError(f"example {key} of the index belongs to no task; export the bundle again")
        return name


def new_index(dimension: int, dtype: str, *, vectors: int = 0, editable: bool = True) -> Index:
    """An empty cosine index; one that is not `editable` cannot find vectors by key.

    Args:
        vectors: how many it is to hold; a large one gets a denser graph.
    """
    from usearch.index import Index

    large = vectors > EXACT_BELOW
    return Index(
        ndim=dimension,
        metric="cos",
        dtype=dtype,
        enable_key_lookups=editable,
        connectivity=CONNECTIVITY if large else None,
        expansion_add=EXPANSION_ADD if large else None,
        expansion_search=EXPANSION_SEARCH if large else None,
    )


def open_index(source: Path | bytes, spec: IndexSpec, *, editable: bool = False) -> Index:
    """Open an index whose file fits its description and leads nowhere else (USearch itself accepts whatever it reads).

    Args:
        source: the file, or its bytes, which must live as long as the index.
        editable: read it into memory, for vectors to be added and fetched by key. Otherwise the file is mapped, read
            as a search walks it, and only searched: finding vectors by key needs a table of all keys.

    Raises:
        RetrievalError: unreadable, or of another size, dimension or type than `spec` says.
    """
    place, data = (source.name, str(source)) if isinstance(source, Path) else (spec.file, source)
    check_index_file(source, spec, unique=editable)
    index = new_index(spec.dimension, spec.dtype, vectors=spec.vectors, editable=editable)
    with native(RetrievalError, f"index '{place}' cannot be loaded"):
        (index.load if editable else index.view)(data)
    if len(index) != spec.vectors:
        raise RetrievalError(
            f"index '{place}' holds {len(index)} vectors, expected {spec.vectors}; export the bundle again"
        )
    return index


def vectors_of(index: Index, keys: npt.NDArray[np.uint64]) -> Float:
    """Vectors (n, dimension) of an editable index, by key.

    Raises:
        RetrievalError: the index lacks a key.
    """
    with native(RetrievalError, "vectors cannot be taken out of the index"):
        if not index.contains(keys).all():
            raise ValueError("a task has examples that it lacks")
        return np.asarray(index.get(keys), np.float32).reshape(len(keys), index.ndim)


def save_index(index: Index, path: Path) -> None:
    """Write an index to a file.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    try:
        index.save(str(path))
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, f"cannot be written ({error})", str(path)) from error
    if path.stat().st_size < index.serialized_length:  # USearch does not look whether its last bytes were written
        raise OSError(errno.ENOSPC, "cannot be written as a whole", str(path))
