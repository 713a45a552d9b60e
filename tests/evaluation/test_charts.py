"""Charts of an evaluation."""

from __future__ import annotations

import sys

import pytest

from edgecompose.errors import EvaluationError
from edgecompose.evaluation.charts import colours, draw_charts, require_matplotlib
from edgecompose.evaluation.results import Evaluation, Result
from tests.evaluation.reports import answered, example_evaluation

pytestmark = pytest.mark.slow


def test_only_what_there_is_is_drawn() -> None:
    charts = {names: draw_charts(example_evaluation(names).summary()) for names in (("base",), ("base", "own"))}
    assert [chart.name for chart in charts["base",]] == ["accuracy"]
    assert [chart.name for chart in charts["base", "own"]] == ["accuracy", "weights"]
    svgs = [draw_charts(example_evaluation(("base",)).summary())[0].svg for _ in range(2)]
    assert svgs[0] == svgs[1]


def test_negative_and_large_weights_are_drawn() -> None:
    one = answered("film", 0, True, "retrieved")
    weights = [{"film": 1.7, "quiz": -0.4}, {}]
    rows = tuple(Result(one.example, True, "yes", weight, "film", 1.0, 0.9, True, one.timings_ms) for weight in weights)
    charts = {chart.name: chart for chart in draw_charts(Evaluation("retrieved", {"retrieved": rows}).summary())}
    assert ">-20<" in charts["weights"].svg
    assert ">85<" in charts["weights"].svg


def test_variants_have_distinct_colours() -> None:
    result = colours(example_evaluation(tuple(map(str, range(8))) + ("base", "retrieved")).summary())
    assert len(set(result.values())) == 10


def test_a_missing_matplotlib_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EvaluationError, match=r"pip install 'edgecompose\[report\]'"):
        require_matplotlib()
