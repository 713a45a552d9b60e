"""Searching an index, and refusing one that is not what the manifest says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from usearch.index import Index

from edgecompose.bundle.specs import IndexSpec, TaskSpec
from edgecompose.errors import RetrievalError, UnknownAdapter
from edgecompose.retrieval import index as retrieval
from edgecompose.retrieval.index import ExampleIndex, open_index
from tests.factories import write_index

Float = npt.NDArray[np.float32]
DIMENSION, COUNTS = 16, {"alpha": 7, "none": 0, "beta": 20, "gamma": 13}
TASKS = {
    name: TaskSpec({"one": 1.0}, sum(list(COUNTS.values())[:position]), count)
    for position, (name, count) in enumerate(COUNTS.items())
}
TOTAL = sum(COUNTS.values())


def _vectors(seed: int = 0, count: int = TOTAL) -> Float:
    return np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)


def _cosines(vectors: Float, query: Float) -> npt.NDArray[np.float64]:
    rows = vectors.astype(np.float64)
    return np.asarray(rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query), np.float64)


@pytest.fixture
def spec(tmp_path: Path) -> IndexSpec:
    return write_index(tmp_path / "index.usearch", _vectors())


@pytest.fixture
def index(tmp_path: Path, spec: IndexSpec) -> ExampleIndex:
    return ExampleIndex(tmp_path / spec.file, spec, TASKS)


@pytest.mark.parametrize("count", [0, 1, 40, 300])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_an_index_holds_exactly_the_vectors_that_were_given(tmp_path: Path, count: int, dtype: str) -> None:
    """The authors' prototype adds an example once for each of its fields."""
    spec = write_index(tmp_path / "index.usearch", _vectors(count=count), dtype=dtype)
    assert len(open_index(tmp_path / spec.file, spec)) == count == spec.vectors


def test_neighbours_come_in_the_order_of_their_cosine(index: ExampleIndex) -> None:
    assert len(index) == TOTAL
    for query in _vectors(seed=1, count=5):
        cosines = _cosines(_vectors(), query)
        result = index.search(query, 12)
        assert [n.key for n in result] == np.argsort(-cosines)[:12].tolist()
        assert [n.similarity for n in result] == pytest.approx(cosines[[n.key for n in result]], abs=1e-5)


def test_a_float16_index_is_close(tmp_path: Path) -> None:
    spec = write_index(tmp_path / "index.usearch", _vectors(), dtype="f16")
    query = _vectors(seed=1, count=1)[0]
    result = ExampleIndex(tmp_path / spec.file, spec, TASKS).search(query, TOTAL)
    assert [n.similarity for n in result] == pytest.approx(
        _cosines(_vectors(), query)[[n.key for n in result]], abs=5e-3
    )


def test_a_neighbour_knows_its_task(index: ExampleIndex) -> None:
    for neighbour in index.search(_vectors()[9], TOTAL):
        task = TASKS[neighbour.task]
        assert task.first_key <= neighbour.key < task.first_key + task.examples
    nearest = index.search(_vectors()[9], 1)[0]
    assert (nearest.task, nearest.key) == ("beta", 9)
    assert nearest.similarity == pytest.approx(1)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("length", [1e-6, 1e6])
def test_the_length_of_a_query_does_not_matter(tmp_path: Path, dtype: str, length: float) -> None:
    spec = write_index(tmp_path / "index.usearch", _vectors(), dtype=dtype)
    index = ExampleIndex(tmp_path / spec.file, spec, TASKS)
    query = _vectors(seed=1, count=1)[0]
    plain, scaled = index.search(query, 5), index.search(query * np.float32(length), 5)
    assert [n.key for n in scaled] == [n.key for n in plain]
    assert [n.similarity for n in scaled] == pytest.approx([n.similarity for n in plain], abs=5e-3)


@pytest.mark.parametrize("exclude", [("alpha",), ("beta", "beta"), ("alpha", "gamma", "none")])
def test_excluded_tasks_are_passed_over_and_nothing_else(index: ExampleIndex, exclude: tuple[str, ...]) -> None:
    query = _vectors(seed=2, count=1)[0]
    remaining = [n for n in index.search(query, TOTAL) if n.task not in exclude]
    assert index.search(query, 5, exclude=exclude) == remaining[:5]
    assert index.search(query, TOTAL, exclude=exclude) == remaining


def test_more_than_there_are_gives_all(index: ExampleIndex) -> None:
    assert sorted(n.key for n in index.search(_vectors()[0], 10 * TOTAL)) == list(range(TOTAL))


@pytest.mark.parametrize(
    "query",
    [
        np.zeros(DIMENSION),
        np.full(DIMENSION, np.nan),
        np.full(DIMENSION, np.inf),
        np.ones(DIMENSION - 1),
        np.ones((1, DIMENSION)),
        np.ones(0),
    ],
)
def test_an_unusable_query_is_refused(index: ExampleIndex, query: npt.NDArray[np.float64]) -> None:
    with pytest.raises(RetrievalError, match="cannot be searched"):
        index.search(query.astype(np.float32), 3)


def test_excluding_everything_or_something_unknown_is_refused(index: ExampleIndex) -> None:
    with pytest.raises(RetrievalError, match="no example is left"):
        index.search(_vectors()[0], 3, exclude=COUNTS)
    with pytest.raises(UnknownAdapter, match="'delta'"):
        index.search(_vectors()[0], 3, exclude=("alpha", "delta"))


def test_an_empty_index_has_no_neighbour(tmp_path: Path) -> None:
    spec = write_index(tmp_path / "empty.usearch", _vectors(count=0))
    with pytest.raises(RetrievalError, match="no example is left"):
        ExampleIndex(tmp_path / spec.file, spec, {}).search(_vectors()[0], 3)


def test_a_vector_of_no_task_is_refused(tmp_path: Path, spec: IndexSpec) -> None:
    tasks = {name: task for name, task in TASKS.items() if name != "gamma"}
    with pytest.raises(RetrievalError, match="belongs to no task"):
        ExampleIndex(tmp_path / spec.file, spec, tasks).search(_vectors()[0], TOTAL)


def test_an_index_that_is_not_as_described_is_refused(tmp_path: Path, spec: IndexSpec) -> None:
    for wrong in (replace(spec, vectors=TOTAL + 1), replace(spec, vectors=0), replace(spec, dimension=DIMENSION * 2)):
        with pytest.raises(RetrievalError, match="expected"):
            open_index(tmp_path / spec.file, wrong)


def test_an_index_of_another_number_type_is_refused(tmp_path: Path, spec: IndexSpec) -> None:
    with pytest.raises(RetrievalError):
        open_index(tmp_path / spec.file, replace(spec, dtype="f16"))


def test_what_is_mapped_is_what_is_read(tmp_path: Path, spec: IndexSpec) -> None:
    mapped, read = (open_index(tmp_path / spec.file, spec, editable=editable) for editable in (False, True))
    for query in _vectors()[:5]:
        result, expected = mapped.search(query, 7, threads=1), read.search(query, 7, threads=1)
        np.testing.assert_array_equal(result.keys, expected.keys)
        np.testing.assert_array_equal(result.distances, expected.distances)
    np.testing.assert_allclose(np.asarray(read.get(np.array([3], np.uint64)))[0], _vectors()[3], atol=1e-6)


def test_a_large_index_is_walked_and_finds_what_comparing_all_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "EXACT_BELOW", 1000)
    vectors = _vectors(count=3000)
    spec = write_index(tmp_path / "large.usearch", vectors, dtype="f16")
    for editable in (True, False):
        opened = open_index(tmp_path / spec.file, spec, editable=editable)
        widths = (opened.connectivity, opened.expansion_add, opened.expansion_search)
        assert widths == (retrieval.CONNECTIVITY, retrieval.EXPANSION_ADD, retrieval.EXPANSION_SEARCH)
    index = ExampleIndex(tmp_path / spec.file, spec, {"all": TaskSpec({"one": 1.0}, 0, 3000)})
    result = []
    for query in _vectors(seed=1, count=20):
        expected = set(np.argsort(-_cosines(vectors, query))[:100].tolist())
        result.append(len(expected & {n.key for n in index.search(query, 100)}))
    assert np.mean(result) >= 99


def test_an_index_of_another_metric_is_refused(tmp_path: Path) -> None:
    other = Index(ndim=DIMENSION, metric="l2sq", dtype="f32")
    other.add(np.arange(TOTAL), _vectors(), threads=1)
    other.save(str(tmp_path / "index.usearch"))
    with pytest.raises(RetrievalError):
        open_index(tmp_path / "index.usearch", IndexSpec("index.usearch", TOTAL, DIMENSION, "e", "f32"))


def test_a_damaged_header_is_refused(tmp_path: Path, spec: IndexSpec) -> None:
    path = tmp_path / spec.file
    whole = path.read_bytes()
    magic = whole.index(b"usearch")
    contents = [
        b"",
        whole[:10],
        whole[: magic + 20],
        whole[:-1],
        b"text" * 200,
        whole[:magic] + b"XXXXXXX" + whole[magic + 7 :],
        whole[: magic + 14] + b"\xff\xff" + whole[magic + 16 :],
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(RetrievalError):
            open_index(path, spec)


def test_an_absent_index_is_refused(tmp_path: Path, spec: IndexSpec) -> None:
    with pytest.raises(RetrievalError):
        open_index(tmp_path / "absent.usearch", spec)
