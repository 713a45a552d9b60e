"""The learned metric: its laws, and hostile files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edgecompose.errors import RetrievalError
from edgecompose.retrieval.index import ExampleIndex
from edgecompose.retrieval.whitening import Whitening, fit_whitening, load_whitening, save_whitening
from tests.factories import write_index
from tests.retrieval.test_index import TASKS, TOTAL

Float = npt.NDArray[np.float32]
WIDTH = 8


def labelled(seed: int, count: int = 400, tasks: int = 4, spread: float = 20.0) -> tuple[Float, list[int]]:
    """Vectors of tasks that differ in the first axes, and among themselves mostly along the last two, as topics do."""
    rng = np.random.default_rng(seed)
    labels = [i % tasks for i in range(count)]
    scales = np.ones(WIDTH)
    scales[-2:] = spread
    return (np.eye(WIDTH)[labels] * 3 + rng.normal(size=(count, WIDTH)) * scales).astype(np.float32), labels


def within(vectors: npt.NDArray[Any], labels: list[int]) -> npt.NDArray[np.float64]:
    """Mean covariance around the means of tasks."""
    centred = vectors.astype(np.float64)
    for label in set(labels):
        chosen = np.array(labels) == label
        centred[chosen] -= centred[chosen].mean(axis=0)
    return np.asarray(centred.T @ centred / len(centred), np.float64)


@given(st.integers(0, 99))
def test_tasks_vary_alike_in_all_directions(seed: int) -> None:
    vectors, labels = labelled(seed)
    whitening = fit_whitening(vectors, labels, shrinkage=1e-9)
    turned = (vectors - whitening.mean) @ whitening.matrix
    assert within(turned, labels) == pytest.approx(np.eye(WIDTH), abs=1e-3)


@given(st.integers(0, 99))
def test_full_shrinkage_only_moves_the_origin(seed: int) -> None:
    vectors, labels = labelled(seed)
    whitening = fit_whitening(vectors, labels, shrinkage=1)
    assert whitening.matrix == pytest.approx(np.eye(WIDTH) * whitening.matrix[0, 0], abs=1e-5)
    assert whitening.mean == pytest.approx(vectors.mean(axis=0), abs=1e-4)


@given(st.integers(0, 99), st.integers(2, 6))
def test_turning_the_input_turns_nothing_of_the_distances(seed: int, remaining: int) -> None:
    vectors, labels = labelled(seed)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    one, other = (
        fit_whitening(v, labels, shrinkage=0.1, dimension=remaining)(v)[:20] for v in (vectors, vectors @ turn)
    )
    assert one.shape == (20, remaining)
    assert one @ one.T == pytest.approx(other @ other.T, abs=2e-3)


def test_a_topic_no_longer_drowns_the_task() -> None:
    vectors, labels = labelled(0)
    known, request = vectors[:300], vectors[300:]
    whitening = fit_whitening(known, labels[:300], shrinkage=0.05)

    def routed(rows: Float, queries: Float) -> float:
        nearest = (queries @ rows.T / np.linalg.norm(rows, axis=1)).argmax(axis=1)
        return float(np.mean([labels[n] == labels[300 + i] for i, n in enumerate(nearest)]))

    assert routed(whitening(known), whitening(request)) > routed(known, request) + 0.15


def test_vectors_get_unit_norm_and_the_mean_stays_zero() -> None:
    whitening = fit_whitening(*labelled(1), shrinkage=0.1)
    assert np.linalg.norm(whitening(labelled(2)[0]), axis=1) == pytest.approx(1)
    assert not whitening(whitening.mean).any()


def test_it_survives_the_disk_and_the_index_applies_it_to_queries(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(TOTAL, WIDTH)).astype(np.float32)
    whitening = fit_whitening(vectors, [i % 3 for i in range(TOTAL)], shrinkage=0.1, dimension=5)
    save_whitening(tmp_path / "w.safetensors", whitening)
    read = load_whitening(tmp_path / "w.safetensors", WIDTH, 5)
    assert np.array_equal(read.mean, whitening.mean) and np.array_equal(read.matrix, whitening.matrix)
    index = ExampleIndex(tmp_path / "i", write_index(tmp_path / "i", whitening(vectors)), TASKS, read)
    for key in (0, 7, TOTAL - 1):
        unit = vectors[key] / np.linalg.norm(vectors[key])
        expected = whitening(vectors) @ whitening(unit)
        result = index.search(vectors[key], TOTAL)
        assert [n.similarity for n in result] == pytest.approx(sorted(expected, reverse=True), abs=1e-4)
    with pytest.raises(RetrievalError, match=f"{WIDTH} finite numbers"):
        index.search(np.ones(5, np.float32), 1)


@pytest.mark.parametrize(
    ("vectors", "labels", "shrinkage", "dimension"),
    [
        (np.ones((3, 2)), [0, 1, 2], 0.1, None),
        (np.ones((3, 2)), [0, 0], 0.1, None),
        (np.ones(3), [0, 0, 1], 0.1, None),
        (np.ones((3, 2)), [0, 0, 1], 0.0, None),
        (np.ones((3, 2)), [0, 0, 1], 1.1, None),
        (np.ones((3, 2)), [0, 0, 1], 0.1, 0),
        (np.ones((3, 2)), [0, 0, 1], 0.1, 3),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    vectors: Float, labels: list[int], shrinkage: float, dimension: int | None
) -> None:
    with pytest.raises(RetrievalError):
        fit_whitening(vectors.astype(np.float32), labels, shrinkage=shrinkage, dimension=dimension)


def test_equal_vectors_give_a_finite_map() -> None:
    assert np.isfinite(fit_whitening(np.ones((4, 3), np.float32), [0, 0, 1, 1], shrinkage=0.1).matrix).all()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mean": np.zeros(4, np.float32)}, "cannot be read"),
        ({"mean": np.zeros(4, np.float32), "matrix": np.ones((4, 2), np.float32)}, "is of shape"),
        ({"mean": np.zeros(3, np.float32), "matrix": np.ones((4, 3), np.float32)}, "expected"),
        ({"mean": np.zeros(4, np.float32), "matrix": np.zeros((4, 3), np.float32)}, "every vector to zero"),
        ({"mean": np.zeros(4, np.float32), "matrix": np.full((4, 3), 1e-45, np.float32)}, "every vector to zero"),
        ({"mean": np.full(4, 1e30, np.float32), "matrix": np.ones((4, 3), np.float32)}, "reach 1e\\+30"),
        ({"mean": np.zeros(4, np.float32), "matrix": np.full((4, 3), 3e38, np.float32)}, "reach 3e\\+38"),
        ({"mean": np.zeros(4, np.float64), "matrix": np.ones((4, 3), np.float32)}, "expected mean and matrix"),
        ({"mean": np.zeros(4, np.float32), "matrix": np.ones((4, 3), np.float32), "x": np.ones(1, np.float32)}, "'x'"),
        ({"mean": np.zeros(4, np.float32), "matrix": np.full((4, 3), np.nan, np.float32)}, "not finite"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, tensors: dict[str, Float], message: str) -> None:
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(RetrievalError, match=message):
        load_whitening(tmp_path / "w.safetensors", 4, 3)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"{}"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(RetrievalError, match="cannot be read"):
        load_whitening(tmp_path / "w.safetensors", 4, 3)


def test_a_whitening_of_odd_shapes_is_refused() -> None:
    with pytest.raises(RetrievalError, match="expected"):
        Whitening(np.zeros(3, np.float32), np.zeros(3, np.float32))
