"""Costs of passes: what was measured, what lies between, and what a busy moment leaves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.engine.decoding.pass_costs import PassCosts


def relative(costs: PassCosts, most: int = 9) -> list[float]:
    return [costs(tokens) / costs(1) for tokens in range(1, most + 1)]


def fill(costs: PassCosts, tokens: int, seconds: float, times: int = 15) -> None:
    for _ in range(times):
        costs.add(tokens, seconds)


def test_what_was_not_measured_costs_what_it_does_elsewhere() -> None:
    costs = PassCosts()
    assert relative(costs, 20)[:9] == pytest.approx([1, 1.12, 1.295, 1.47, 1.64, 1.81, 1.98, 2.15, 2.325])
    assert costs(20) == pytest.approx(3.55 + 4 * 0.175)
    fill(costs, 2, 5.0)
    assert costs(2) == pytest.approx(1.12), "without the cost of one token, others have no measure"
    fill(costs, 1, 0.01)
    assert costs(1) == pytest.approx(0.01)
    assert costs(2) == pytest.approx(5.0)


@given(st.dictionaries(st.integers(2, 9), st.floats(0.5, 4.0)), st.floats(1e-4, 1.0))
def test_measured_sizes_cost_what_was_measured_and_others_lie_between(factors: dict[int, float], one: float) -> None:
    prior, costs = PassCosts(), PassCosts()
    fill(costs, 1, one)
    for tokens, factor in factors.items():
        fill(costs, tokens, one * prior(tokens) * factor)
    deviations = [costs(tokens) / (one * prior(tokens)) for tokens in range(1, 10)]
    known = {1: 1.0, **factors}
    for tokens, deviation in enumerate(deviations, 1):
        if tokens in known:
            assert deviation == pytest.approx(known[tokens])
        else:
            nearest = [known[max(n for n in known if n < tokens)]]
            nearest += [known[n] for n in [min((n for n in known if n > tokens), default=0)] if n]
            assert min(nearest) - 1e-9 <= deviation <= max(nearest) + 1e-9


def test_one_slow_pass_changes_nothing() -> None:
    costs = PassCosts()
    fill(costs, 1, 0.01)
    before = relative(costs)
    costs.add(5, 10.0)
    costs.add(1, 10.0)
    assert relative(costs) == before


def test_what_a_busy_moment_made_slow_is_tried_again() -> None:
    costs = PassCosts()
    fill(costs, 1, 0.01)
    before = relative(costs)
    fill(costs, 9, 10.0)
    assert relative(costs)[8] > 100 > before[8]
    fill(costs, 1, 0.01, 600)
    assert relative(costs) == pytest.approx(before)


@pytest.mark.parametrize(("tokens", "seconds"), [(73, 1.0), (0, 1.0), (128, 1.0), (1, 0.0), (1, -1.0)])
def test_what_nobody_asks_for_is_left_out(tokens: int, seconds: float) -> None:
    costs = PassCosts()
    fill(costs, tokens, seconds)
    assert costs(1) == 1.0


def test_sizes_beyond_what_is_measured_go_on_as_the_largest() -> None:
    prior, costs = PassCosts(), PassCosts()
    fill(costs, 1, 0.01)
    fill(costs, 72, 0.01 * prior(72) * 1.5)
    assert costs(200) == pytest.approx(0.01 * prior(200) * 1.5)


def test_threads_add_at_once() -> None:
    costs = PassCosts()

    def work(tokens: int) -> float:
        for _ in range(50):
            costs.add(tokens, tokens * 0.01)
            costs(9)
        return costs(tokens)

    fill(costs, 1, 0.01)
    with ThreadPoolExecutor(9) as threads:
        list(threads.map(work, range(1, 10)))
    assert relative(costs) == pytest.approx(range(1, 10))
