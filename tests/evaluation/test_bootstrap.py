"""Bootstrap intervals and paired differences: laws, and a textbook value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.errors import EvaluationError
from edgecompose.evaluation.bootstrap import Bools, bootstrap_interval, mean_interval, paired_bootstrap

RIGHT = st.lists(st.booleans(), min_size=1, max_size=60).map(lambda bits: np.array(bits))
PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60).map(lambda pairs: np.array(pairs).T)


@given(RIGHT, st.integers(0, 99))
def test_an_interval_holds_the_accuracy(right: Bools, seed: int) -> None:
    low, high = bootstrap_interval(right, seed)
    assert 0 <= low <= right.mean() <= high <= 1
    assert bootstrap_interval(right, seed) == (low, high)
    assert bootstrap_interval(~right, seed) == pytest.approx((1 - high, 1 - low))


@given(st.lists(RIGHT, min_size=1, max_size=5))
def test_the_interval_of_a_mean_holds_the_mean(tasks: list[Bools]) -> None:
    low, high = mean_interval(tasks)
    assert low - 1e-12 <= np.mean([task.mean() for task in tasks]) <= high + 1e-12


def test_an_interval_is_that_of_the_textbook() -> None:
    right = np.arange(400) < 300
    low, high = bootstrap_interval(right)
    spread = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.75 - spread, 0.75 + spread), abs=5e-3)
    tasks = [right, ~right, right, ~right]
    assert np.diff(mean_interval(tasks)) == pytest.approx(spread, abs=5e-3)  # half as wide with four tasks
    assert bootstrap_interval(np.ones(7, bool)) == (1, 1)


def test_many_examples_are_drawn_in_parts() -> None:
    right = np.arange(9000) % 2 == 0
    assert bootstrap_interval(right) == pytest.approx((0.49, 0.51), abs=2e-3)


@given(PAIRS, st.integers(0, 99))
def test_a_paired_comparison_is_antisymmetric(pairs: Bools, seed: int) -> None:
    there, back = (paired_bootstrap([one], [other], seed) for one, other in (pairs, pairs[::-1]))
    assert there.difference == -back.difference == pytest.approx(pairs[0].mean() - pairs[1].mean())
    assert there.ci95 == pytest.approx((-back.ci95[1], -back.ci95[0]))
    assert there.wins + back.wins <= 1
    assert there.ci95[0] <= there.difference <= there.ci95[1]


def test_a_pair_is_sharper_than_two_alone() -> None:
    """The better one is right wherever the other is: the difference is sure although both accuracies are not."""
    rng = np.random.default_rng(0)
    other = rng.random(100) < 0.5
    one = other | (rng.random(100) < 0.1)
    result = paired_bootstrap([one], [other])
    assert result.ci95[0] > 0
    assert result.wins == pytest.approx(1, abs=0.01)
    assert bootstrap_interval(one)[0] < bootstrap_interval(other)[1]
    same = paired_bootstrap([one, other], [one, other])
    assert (same.difference, same.ci95, same.wins) == (0, (0, 0), 0)


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(EvaluationError, match="at least one example"):
        bootstrap_interval(np.array([], bool))
    with pytest.raises(EvaluationError, match="at least one example"):
        mean_interval([])
    with pytest.raises(EvaluationError, match="same examples"):
        paired_bootstrap([np.ones(2, bool)], [np.ones(3, bool)])
