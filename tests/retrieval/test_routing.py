"""Neighbours to weights: the laws of the distribution and of its nucleus."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.errors import RetrievalError
from edgecompose.retrieval.index import Neighbour
from edgecompose.retrieval.routing import adapter_weights, nucleus, task_distribution, weigh
from edgecompose.settings import RetrievalSettings

TASKS = ("a", "b", "c", "d", "e")
NEIGHBOURS = st.lists(
    st.builds(Neighbour, st.sampled_from(TASKS), st.integers(0, 99), st.floats(-1, 1)), min_size=1, max_size=30
)
SIZES = {"a": 1, "b": 10, "c": 100, "d": 1000, "e": 7}
TEMPERATURES = st.floats(0.01, 100)
SHARES = st.lists(st.floats(1e-6, 1), min_size=1, max_size=7).map(
    lambda raw: {f"t{i}": share / math.fsum(raw) for i, share in enumerate(raw)}
)


@given(NEIGHBOURS, TEMPERATURES)
def test_shares_sum_to_1_largest_first(neighbours: list[Neighbour], temperature: float) -> None:
    shares = task_distribution(neighbours, temperature)
    assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert set(shares) == {n.task for n in neighbours}


@given(NEIGHBOURS, TEMPERATURES, st.randoms(use_true_random=False))
def test_the_order_of_neighbours_does_not_matter(neighbours: list[Neighbour], temperature: float, rng: Random) -> None:
    shuffled = rng.sample(neighbours, len(neighbours))
    assert task_distribution(shuffled, temperature) == pytest.approx(task_distribution(neighbours, temperature))


@given(NEIGHBOURS, st.floats(0.05, 100))
def test_shares_are_those_of_the_formula(neighbours: list[Neighbour], temperature: float) -> None:
    naive = dict.fromkeys((n.task for n in neighbours), 0.0)
    for n in neighbours:
        naive[n.task] += math.exp(-(1 - n.similarity) / temperature)
    total = sum(naive.values())
    assert task_distribution(neighbours, temperature) == pytest.approx({t: s / total for t, s in naive.items()})


@given(st.floats(-1, 1), st.floats(-1, 1), TEMPERATURES)
def test_the_nearer_task_is_never_lighter(one: float, other: float, temperature: float) -> None:
    shares = task_distribution([Neighbour("a", 0, one), Neighbour("b", 1, other)], temperature)
    assert one < other or shares["a"] >= shares["b"]


def test_weight_grows_with_similarity() -> None:
    """The authors' prototype has exp(+distance / T), under which the farther task is the heavier."""
    shares = [
        task_distribution([Neighbour("a", 0, similarity), Neighbour("b", 1, 0.5)], 0.2)["a"]
        for similarity in (-0.5, 0.0, 0.4, 0.5, 0.6, 0.9)
    ]
    assert all(low < high for low, high in itertools.pairwise(shares))
    assert shares[3] == 0.5


def test_a_high_temperature_counts_votes() -> None:
    neighbours = [Neighbour("a", 0, 0.9), Neighbour("b", 1, 0.1), Neighbour("b", 2, 0.2)]
    assert task_distribution(neighbours, 1e9) == pytest.approx({"b": 2 / 3, "a": 1 / 3})


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-300, 5e-324])
def test_a_low_temperature_does_not_underflow(temperature: float) -> None:
    neighbours = [Neighbour("far", 0, -1.0), Neighbour("near", 1, -0.9), Neighbour("far", 2, -0.95)]
    assert task_distribution(neighbours, temperature) == {"near": 1.0, "far": pytest.approx(0, abs=1e-9)}


@given(SHARES, st.floats(0.01, 1))
def test_the_nucleus_is_the_smallest_set_that_reaches_p(shares: dict[str, float], p: float) -> None:
    remaining = nucleus(shares, p)
    reached = math.fsum(shares[task] for task in remaining)
    assert reached >= p - 2e-9
    fewer = max((math.fsum(s) for s in itertools.combinations(shares.values(), len(remaining) - 1)), default=0.0)
    assert fewer < p
    assert math.fsum(remaining.values()) == pytest.approx(1)
    assert remaining == pytest.approx({task: shares[task] / reached for task in remaining})
    assert list(remaining.values()) == sorted(remaining.values(), reverse=True)


def test_shares_that_sum_to_p_but_for_rounding_reach_it() -> None:
    assert set(nucleus({"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.1}, 0.9)) == {"a", "b", "c"}


@pytest.mark.parametrize("least", [0.1, 1e-8, 1e-12])
def test_p_1_keeps_every_task(least: float) -> None:
    assert nucleus({"a": least, "b": 1 - least}, 1) == pytest.approx({"b": 1 - least, "a": least})


def test_equal_shares_are_cut_by_name() -> None:
    assert list(nucleus({"c": 0.25, "a": 0.25, "d": 0.25, "b": 0.25}, 0.5)) == ["a", "b"]


def test_tasks_that_share_an_adapter_add_up() -> None:
    serving = {"a": {"one": 1.0}, "b": {"two": 1.0}, "c": {"two": 1.0}, "d": {"three": 1.0}}
    weights = adapter_weights({"a": 0.4, "b": 0.35, "c": 0.25}, serving)
    assert weights == pytest.approx({"two": 0.6, "one": 0.4})
    assert list(weights) == ["two", "one"]


def test_a_task_may_be_served_by_a_blend_by_another_or_by_none() -> None:
    serving = {"a": {"one": 0.75, "two": 0.5}, "b": {"two": 1.0}, "c": {}}
    weights = adapter_weights({"a": 0.4, "b": 0.2, "c": 0.4}, serving)
    assert weights == pytest.approx({"two": 0.4, "one": 0.3})


def test_an_excluded_adapter_leaves_its_share_to_the_base() -> None:
    assert adapter_weights({"a": 0.7, "b": 0.3}, {"a": {"a": 1.0}, "b": {"b": 1.0}}, excluded=["a"]) == {"b": 0.3}


def test_other_adapters_of_a_task_take_the_share_of_an_excluded_one() -> None:
    serving = {"a": {"a": 0.5, "b": 0.25, "c": 0.25}, "d": {"d": 0.8}}
    weights = adapter_weights({"a": 0.6, "d": 0.4}, serving, excluded=["a"])
    assert weights == pytest.approx({"b": 0.3, "c": 0.3, "d": 0.32})


@given(NEIGHBOURS, TEMPERATURES, st.floats(0.1, 1))
def test_what_is_weighed_by_default_is_the_papers_rule(neighbours: list[Neighbour], t: float, p: float) -> None:
    distribution, remaining = weigh(neighbours, RetrievalSettings(routing_temperature=t, nucleus=p), SIZES)
    assert distribution == task_distribution(neighbours, t)
    assert remaining == nucleus(distribution, p)


@given(NEIGHBOURS, TEMPERATURES)
def test_a_class_size_exponent_of_1_counts_shares_of_tasks(neighbours: list[Neighbour], temperature: float) -> None:
    plain = task_distribution(neighbours, temperature)
    corrected, _ = weigh(neighbours, RetrievalSettings(routing_temperature=temperature, class_size_exponent=1.0), SIZES)
    raw = {task: share / SIZES[task] for task, share in plain.items()}
    assert corrected == pytest.approx({task: share / math.fsum(raw.values()) for task, share in raw.items()})
    assert math.fsum(corrected.values()) == pytest.approx(1)


def test_a_likely_task_is_taken_alone() -> None:
    neighbours = [Neighbour("a", 0, 0.9), Neighbour("a", 1, 0.9), Neighbour("b", 2, 0.9)]
    assert weigh(neighbours, RetrievalSettings(shortcut=0.6), SIZES)[1] == {"a": 1.0}
    assert set(weigh(neighbours, RetrievalSettings(shortcut=0.7), SIZES)[1]) == {"a", "b"}


def test_votes_that_spread_leave_a_prompt_to_the_base() -> None:
    neighbours = [Neighbour("a", 0, 0.3), Neighbour("b", 1, 0.3), Neighbour("c", 2, 0.3), Neighbour("a", 3, 0.3)]
    distribution, remaining = weigh(neighbours, RetrievalSettings(fallback=0.51), SIZES)
    assert remaining == {} and distribution == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})
    assert weigh(neighbours, RetrievalSettings(fallback=0.49), SIZES)[1] != {}


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_a_positive_number_is_refused(temperature: float) -> None:
    with pytest.raises(RetrievalError, match="temperature"):
        task_distribution([Neighbour("a", 0, 0.5)], temperature)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, math.nan])
def test_a_p_outside_its_range_is_refused(p: float) -> None:
    with pytest.raises(RetrievalError, match="nucleus"):
        nucleus({"a": 1.0}, p)


def test_nothing_has_no_distribution() -> None:
    with pytest.raises(RetrievalError):
        task_distribution([], 1.0)
    with pytest.raises(RetrievalError):
        nucleus({}, 0.9)
