"""Nearest examples at scale: USearch's settings against exact search, hnswlib and Faiss, on the same vectors.

    python benchmarks/retrieval.py models/demo --sizes 10000 100000 [--only NAME...] [--save FILE]

Vectors are drawn around those of the bundle's index: an example and Gaussian noise whose length is that of the distance
between near neighbours, at unit norm; queries are drawn the same way. hnswlib and Faiss are measured where they are
installed (`pip install hnswlib faiss-cpu`). For each: seconds to build, recall@100 against exact float32 search,
milliseconds a query (median and 99th percentile, one at a time on one thread), size of the file, memory that loading it
takes, and milliseconds to load it and to open it as a memory map as the runtime does, each with a first query. Prints a
table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found as a script, however edgecompose is installed

from benchmarks.measuring.machine import machine
from edgecompose.bundle.files import Bundle
from edgecompose.retrieval.index import open_index

Float = npt.NDArray[np.float32]
Keys = npt.NDArray[np.int64]
Search = Callable[[Float], Keys]
#: Memory (1e6 bytes) and milliseconds of loading a file, milliseconds of mapping it.
Reopened = tuple[float | None, float | None, float | None]
COUNT = 100
#: Length of the noise around an example: half the distance between vectors of cosine 0.8.
NOISE = 0.32


@dataclass(frozen=True, slots=True)
class Variant:
    """A library and its settings; `connectivity` 0 compares every vector."""

    library: str
    dtype: str = "f32"
    connectivity: int = 16
    expansion_add: int = 128
    expansion_search: int = 128

    @property
    def name(self) -> str:
        """What the table calls it."""
        built = "" if self.expansion_add == 128 else f" efc={self.expansion_add}"
        graph = f" M={self.connectivity}{built} ef={self.expansion_search}" if self.connectivity else " exact"
        return f"{self.library} {self.dtype}{graph}"


@dataclass(frozen=True, slots=True)
class Result:
    """One row: times in the units of their names, sizes in 1e6 bytes, None where a library has no such thing."""

    variant: str
    vectors: int
    recall: float
    median_ms: float
    p99_ms: float
    build_s: float
    file_mb: float
    memory_mb: float | None = None
    load_ms: float | None = None
    mmap_ms: float | None = None


def sample(bundle: Path, count: int, seed: int) -> Float:
    """Vectors (count, dimension) of unit norm, drawn around those of a bundle's index."""
    opened = Bundle(bundle)
    spec = opened.manifest.index
    index = open_index(opened.path(spec.file), spec, editable=True)
    keys = [k for t in opened.manifest.tasks.values() for k in range(t.first_key, t.first_key + t.examples)]
    real = np.asarray(index.get(np.array(keys, np.uint64)), np.float32)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, spec.dimension), np.float32) * np.float32(NOISE / np.sqrt(spec.dimension))
    vectors = real[rng.integers(0, len(real), count)] + noise
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def exact(vectors: Float, queries: Float) -> Keys:
    """The COUNT nearest of each query, (queries, COUNT), by float32 products over pieces of the vectors."""
    best = np.full((len(queries), COUNT), -2, np.float32)
    keys = np.zeros((len(queries), COUNT), np.int64)
    for start in range(0, len(vectors), 1 << 17):
        scores = queries @ vectors[start : start + (1 << 17)].T
        both = np.concatenate([best, scores], axis=1)
        names = np.concatenate([keys, np.broadcast_to(np.arange(scores.shape[1]) + start, scores.shape)], axis=1)
        chosen = np.argpartition(-both, COUNT - 1, axis=1)[:, :COUNT]
        best, keys = np.take_along_axis(both, chosen, 1), np.take_along_axis(names, chosen, 1)
    return keys


def recall(neighbours: Sequence[Keys], exact: Keys) -> float:
    """Share of the true COUNT nearest that a search returns."""
    return float(
        np.mean([len(set(f.tolist()) & set(w.tolist())) / COUNT for f, w in zip(neighbours, exact, strict=True)])
    )


def timed(search: Search, queries: Float) -> tuple[list[Keys], Float]:
    """What a search finds for each query, and its milliseconds."""
    for query in queries[:10]:
        search(query)
    neighbours, elapsed_ms = [], np.empty(len(queries), np.float32)
    for i, query in enumerate(queries):
        start = time.perf_counter()
        neighbours.append(search(query))
        elapsed_ms[i] = (time.perf_counter() - start) * 1e3
    return neighbours, elapsed_ms


def measure(variants: Sequence[Variant], vectors: Float, queries: Float, exact: Keys) -> list[Result]:
    """A row for each variant; those that differ in `expansion_search` alone share one graph."""
    rows = []
    built: dict[Variant, tuple[Any, float]] = {}
    for variant in variants:
        key = replace(variant, expansion_search=0)
        if key not in built:
            built = {}  # let go of the graph before
            start = time.perf_counter()
            built[key] = (_LIBRARIES[variant.library].build(variant, vectors), 0.0)
            built[key] = (built[key][0], time.perf_counter() - start)
        index, seconds = built[key]
        library = _LIBRARIES[variant.library]
        neighbours, elapsed_ms = timed(library.searcher(variant, index), queries)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index"
            library.save(index, path)
            size = path.stat().st_size / 1e6 if path.exists() else vectors.nbytes / 1e6
            reopened = library.reopen(variant, path, queries[0])
        row = Result(
            variant.name,
            len(vectors),
            recall(neighbours, exact),
            float(np.median(elapsed_ms)),
            float(np.percentile(elapsed_ms, 99)),
            seconds,
            size,
            *reopened,
        )
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def reading(load: Callable[[], Any]) -> tuple[float | None, float]:
    """Memory (1e6 bytes, Linux) and milliseconds that loading takes; what was loaded is let go of."""
    before, start = resident(), time.perf_counter()
    loaded = load()
    elapsed_ms = (time.perf_counter() - start) * 1e3
    after = resident()
    del loaded
    return None if before is None or after is None else (after - before) / 1e6, elapsed_ms


def resident() -> int | None:
    """Bytes of this process that lie in memory; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


class _USearch:
    def build(self, variant: Variant, vectors: Float) -> Any:
        index = importlib.import_module("usearch.index").Index(
            ndim=vectors.shape[1],
            metric="cos",
            dtype=variant.dtype,
            connectivity=variant.connectivity or 16,
            expansion_add=variant.expansion_add,
            expansion_search=variant.expansion_search,
        )
        index.add(np.arange(len(vectors), dtype=np.uint64), vectors, threads=os.cpu_count() or 1)
        return index

    def searcher(self, variant: Variant, index: Any) -> Search:
        index.expansion_search = variant.expansion_search
        flat = variant.connectivity == 0
        return lambda query: np.asarray(index.search(query, COUNT, threads=1, exact=flat).keys, np.int64)

    def save(self, index: Any, path: Path) -> None:
        index.save(str(path))

    def reopen(self, variant: Variant, path: Path, query: Float) -> Reopened:
        kind = importlib.import_module("usearch.index").Index

        def load(*, view: bool) -> Any:
            index = kind(ndim=len(query), metric="cos", dtype=variant.dtype, enable_key_lookups=not view)
            (index.view if view else index.load)(str(path))
            index.search(query, COUNT, threads=1)
            return index

        return *reading(lambda: load(view=False)), reading(lambda: load(view=True))[1]


class _Numpy:
    def build(self, variant: Variant, vectors: Float) -> Float:
        return vectors

    def searcher(self, variant: Variant, index: Float) -> Search:
        def search(query: Float) -> Keys:
            scores = index @ query
            return np.asarray(np.argpartition(-scores, COUNT - 1)[:COUNT], np.int64)

        return search

    def save(self, index: Float, path: Path) -> None:
        """Nothing: its file is the vectors."""

    def reopen(self, variant: Variant, path: Path, query: Float) -> Reopened:
        return None, None, None


class _Hnswlib:
    def build(self, variant: Variant, vectors: Float) -> Any:
        index = importlib.import_module("hnswlib").Index(space="cosine", dim=vectors.shape[1])
        index.init_index(len(vectors), ef_construction=variant.expansion_add, M=variant.connectivity)
        index.add_items(vectors, num_threads=os.cpu_count() or 1)
        return index

    def searcher(self, variant: Variant, index: Any) -> Search:
        index.set_ef(max(variant.expansion_search, COUNT))
        return lambda query: np.asarray(index.knn_query(query, COUNT, num_threads=1)[0][0], np.int64)

    def save(self, index: Any, path: Path) -> None:
        index.save_index(str(path))

    def reopen(self, variant: Variant, path: Path, query: Float) -> Reopened:
        def load() -> Any:
            index = importlib.import_module("hnswlib").Index(space="cosine", dim=len(query))
            index.load_index(str(path))
            index.knn_query(query, 1)
            return index

        return *reading(load), None


class _Faiss:
    def build(self, variant: Variant, vectors: Float) -> Any:
        faiss = importlib.import_module("faiss")
        if variant.connectivity == 0:
            index = faiss.IndexFlatIP(vectors.shape[1])
        else:
            index = faiss.IndexHNSWFlat(vectors.shape[1], variant.connectivity, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = variant.expansion_add
        index.add(vectors)
        return index

    def searcher(self, variant: Variant, index: Any) -> Search:
        importlib.import_module("faiss").omp_set_num_threads(1)
        if variant.connectivity:
            index.hnsw.efSearch = max(variant.expansion_search, COUNT)
        return lambda query: np.asarray(index.search(query[None], COUNT)[1][0], np.int64)

    def save(self, index: Any, path: Path) -> None:
        importlib.import_module("faiss").write_index(index, str(path))

    def reopen(self, variant: Variant, path: Path, query: Float) -> Reopened:
        def load() -> Any:
            index = importlib.import_module("faiss").read_index(str(path))
            index.search(query[None], COUNT)
            return index

        return *reading(load), None


_LIBRARIES: dict[str, Any] = {"usearch": _USearch(), "numpy": _Numpy(), "hnswlib": _Hnswlib(), "faiss": _Faiss()}


def variants(quick: bool) -> list[Variant]:
    """What is measured; the rivals where they are installed."""
    rows = [Variant("numpy", connectivity=0), *(Variant("usearch", dtype, 0) for dtype in ("f32", "f16", "i8"))]
    settings = [("f16", 16), ("i8", 16)] if quick else [("f32", 16), ("f16", 16), ("i8", 16), ("f16", 32)]
    for dtype, connectivity in settings:
        rows += [Variant("usearch", dtype, connectivity, 128, ef) for ef in (128, 256, 512)]
    rows += [Variant("usearch", "f16", 32, 256, ef) for ef in (128, 192, 256, 512)]
    for library in ("hnswlib", "faiss"):
        if importlib.util.find_spec(library) is not None:
            rows += [Variant(library, "f32", 16, 128, ef) for ef in (128, 256, 512)]
    return rows


def _line(row: Result) -> str:
    values = (row.memory_mb, row.load_ms, row.mmap_ms)
    reopened = "".join(" " * 9 if value is None else f"{value:9.1f}" for value in values)
    return (
        f"{row.vectors:9}  {row.variant:28}{row.recall:8.4f}{row.median_ms:9.3f}{row.p99_ms:9.3f}{row.build_s:9.1f}"
        f"{row.file_mb:9.1f}{reopened}"
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="fewer settings of USearch")
    parser.add_argument("--only", nargs="+", help="variants whose names hold one of these, e.g. 'usearch f16 M=16'")
    parser.add_argument("--save", type=Path, help="JSON file; rows that it holds already are kept or replaced")
    options = parser.parse_args()
    print(f"  vectors  {'variant':28}  recall   median      p99  build s  file MB   mem MB  load ms  mmap ms")
    rows: list[Result] = []
    chosen = [c for c in variants(options.quick) if not options.only or any(o in c.name for o in options.only)]
    for size in options.sizes:
        vectors, queries = sample(options.bundle, size, 1), sample(options.bundle, options.queries, 2)
        rows += measure(chosen, vectors, queries, exact(vectors, queries))
        if options.save:
            save(options.save, rows)
    print(json.dumps({"rows": [asdict(row) for row in rows], "noise": NOISE, "machine": machine()}))


def save(path: Path, rows: Sequence[Result]) -> None:
    """Add rows to a file, in the place of those of the same variant and number of vectors."""
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    merged = {(row["variant"], row["vectors"]): row for row in [*known, *map(asdict, rows)]}
    result = {"rows": list(merged.values()), "noise": NOISE, "machine": machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
