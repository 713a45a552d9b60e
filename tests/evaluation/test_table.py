"""The table of an evaluation."""

from __future__ import annotations

import pytest

from edgecompose.evaluation.table import describe_evaluation, signed
from tests.evaluation.reports import HOSTILE, example_evaluation, result_of

pytestmark = pytest.mark.slow


def test_the_table_has_tasks_by_variants_and_the_mean_last() -> None:
    lines = describe_evaluation(result_of(example_evaluation()))
    assert lines[0].split() == ["task", "n", "base", "own", "retrieved"]
    quiz = next(line for line in lines if line.startswith("quiz "))
    assert quiz.split() == ["quiz", "6", "66.7", "66.7", "66.7"]
    assert next(line for line in lines if line.startswith(HOSTILE)).split()[-2] == "-"
    assert [line.split()[0] for line in lines[4:7]] == ["mean", "95", "tasks"]
    assert lines[-1] == "retrieved less own: +0.0 points (+0.0 to +0.0) over 2 tasks"
    assert (signed(-0.0), signed(0.1234), signed(-0.5)) == ("+0.0", "+12.3", "-50.0")
