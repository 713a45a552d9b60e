"""Results summed up: accuracies, comparisons, reliability of the top share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgecompose import open_bundle
from edgecompose.evaluation.bootstrap import bootstrap_interval
from edgecompose.evaluation.examples import EvalExample
from edgecompose.evaluation.results import Result, routing
from edgecompose.evaluation.runner import evaluate, parse_variants
from edgecompose.timing import STAGES
from tests.evaluation.evaluations import EXAMPLES, REQUEST
from tests.fixtures_tiny import TASKS


def test_standings_sum_up(bundle: Path) -> None:
    ticks: list[int] = []
    variants = parse_variants(["own", "base", "retrieved"], REQUEST)
    with open_bundle(bundle, device="cpu") as fresh:  # which has not yet embedded these prompts
        result = evaluate(fresh, EXAMPLES, variants, advance=ticks.append)
    assert ticks == [1] * (3 * len(EXAMPLES))
    metrics = result.metrics("retrieved")
    assert {task: score.n for task, score in metrics.tasks.items()} == {
        "animals": 3,
        "birds": 1,
        "colours": 2,
        "numbers": 2,
    }
    assert metrics.mean == pytest.approx(sum(score.accuracy for score in metrics.tasks.values()) / 4)
    animals = [outcome_of.right for outcome_of in result.results["retrieved"] if outcome_of.example.task == "animals"]
    assert metrics.tasks["animals"].accuracy == sum(animals) / 3
    assert metrics.tasks["animals"].ci95 == bootstrap_interval(np.array(animals))
    assert tuple(metrics.timings_ms) == STAGES
    assert metrics.timings_ms["embed"] > 0
    assert metrics.timings_ms["total"] >= metrics.timings_ms["embed"] + metrics.timings_ms["prefill"]
    assert result.metrics("base").timings_ms["embed"] == 0
    assert result.metrics("base").weights["birds"] == {}
    assert sum(metrics.weights["animals"].values()) == pytest.approx(1)
    assert sum(sum(row.values()) for row in metrics.routing.confusion.values()) == len(EXAMPLES)
    assert sum(b.n for b in metrics.routing.reliability) == len(EXAMPLES) - 1  # no bundle has birds
    assert set(result.metrics("own").tasks) == set(TASKS)
    against = result.against("own")
    assert against is not None
    assert len(against.by_task) == 3
    summary = result.summary()
    assert summary.main == "retrieved"
    assert summary.metrics == {name: result.metrics(name) for name in ("own", "base", "retrieved")}
    assert summary.against == {name: result.against(name) for name in ("own", "base")}
    assert result.misses(99) == [outcome_of for outcome_of in result.results["retrieved"] if not outcome_of.right]
    assert len(result.misses(1)) <= 1


def test_reliability_is_counted_in_bins() -> None:
    def outcome_of(share: float, right: bool) -> Result:
        example = EvalExample("t", "p", "a")
        return Result(example, True, "a", {}, "t" if right else "u", share, 0.5, True, {})

    result = routing([outcome_of(1.0, True), outcome_of(0.95, False), outcome_of(0.91, True), outcome_of(0.3, False)])
    assert [b.n for b in result.reliability] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 3]
    assert result.reliability[9].share == pytest.approx(0.9533, abs=1e-4)
    assert result.reliability[9].right == pytest.approx(2 / 3)
    assert result.error == pytest.approx((3 * abs(0.95333 - 2 / 3) + 0.3) / 4, abs=1e-4)
    assert result.confusion == {"t": {"t": 2, "u": 2}}
    assert routing([]).error is None
