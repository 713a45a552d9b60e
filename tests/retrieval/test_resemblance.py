"""Resemblance is 1 for a task's own examples, whatever the task is, and small for what is far from all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.bundle.specs import TaskSpec
from edgecompose.retrieval.index import Neighbour, open_index
from edgecompose.retrieval.resemblance import resemblance, typical_similarities
from tests.factories import write_index

DIMENSION = 32
TASKS = {"tight": TaskSpec({}, 0, 90), "loose": TaskSpec({}, 90, 90), "alone": TaskSpec({}, 180, 1)}


def neighbours(*pairs: tuple[str, float]) -> list[Neighbour]:
    return [Neighbour(task, key, similarity) for key, (task, similarity) in enumerate(pairs)]


def vectors(spread: float, count: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Vectors around an axis of their own."""
    noise = np.random.default_rng(seed).normal(size=(count, DIMENSION)) * spread / np.sqrt(DIMENSION)
    return np.asarray(noise + np.eye(DIMENSION)[seed], np.float32)


def test_the_similarities_of_a_task_add_up_relative_to_what_is_typical() -> None:
    near = neighbours(("a", 0.8), ("b", 0.6), ("a", 0.4), ("b", -0.2))
    assert resemblance(near, {"a": 0.5, "b": 0.5}) == pytest.approx(0.3 / 0.5)
    assert resemblance(near, {"a": 0.5, "b": 0.1}) == pytest.approx(0.15 / 0.1)
    assert resemblance(near, {"b": 0.5}) == pytest.approx(0.15 / 0.5)
    assert resemblance(near, {}) is None
    assert resemblance([], {"a": 0.5}) is None


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(0.01, 1))
def test_only_the_nearest_count_and_more_similar_ones_count_more(similarities: list[float], typical: float) -> None:
    ordered = sorted(similarities, reverse=True)
    near = neighbours(*(("a", similarity) for similarity in ordered))
    expected = pytest.approx(np.maximum(ordered[:20], 0).mean() / typical)
    assert resemblance(near, {"a": typical}) == expected
    if len(near) >= 20:
        assert resemblance([*near[:20], *neighbours(("a", -1.0)) * 30], {"a": typical}) == expected


def test_examples_of_a_task_resemble_it_and_others_do_not(tmp_path: Path) -> None:
    stored = np.concatenate([vectors(0.3, 90, seed=0), vectors(1.5, 90, seed=1), vectors(0.1, 1, seed=2)])
    spec = write_index(tmp_path / "index.usearch", stored)
    index = open_index(tmp_path / spec.file, spec, editable=True)
    typical = typical_similarities(index, TASKS)
    assert set(typical) == {"tight", "loose"}, "one example alone is like no other"
    assert typical["tight"] > 1.5 * typical["loose"] > 0
    tasks = np.repeat(list(TASKS), [task.examples for task in TASKS.values()])

    def measured(vector: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
        matches = index.search(vector, 40, exact=True)
        near = [
            Neighbour(str(tasks[key]), int(key), float(1 - distance))
            for key, distance in zip(matches.keys, matches.distances, strict=True)
        ]
        return resemblance(near, typical) or 0.0

    for seed, spread in ((0, 0.3), (1, 1.5)):
        fresh = np.random.default_rng(9).normal(size=(40, DIMENSION)) * spread / np.sqrt(DIMENSION)
        own = [measured(np.asarray(vector + np.eye(DIMENSION)[seed], np.float32)) for vector in fresh]
        assert 0.9 < np.median(own) < 1.4
    foreign = [measured(np.asarray(np.eye(DIMENSION)[axis], np.float32)) for axis in range(5, 20)]
    assert np.median(foreign) < 0.7


def test_copies_of_an_example_do_not_raise_what_is_typical(tmp_path: Path) -> None:
    """As where examples were made from one passage, or indexed in several wordings."""
    once = vectors(0.9, 60, seed=0)
    tasks = {"one": TaskSpec({}, 0, 60)}
    spec = write_index(tmp_path / "once.usearch", once)
    alone = typical_similarities(open_index(tmp_path / spec.file, spec, editable=True), tasks)["one"]
    spec = write_index(tmp_path / "copies.usearch", np.repeat(once, 4, axis=0))
    copies = typical_similarities(open_index(tmp_path / spec.file, spec, editable=True), {"one": TaskSpec({}, 0, 240)})
    assert copies["one"] < 1.4 * alone
