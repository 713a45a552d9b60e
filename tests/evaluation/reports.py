"""An evaluation to report on, with hostile texts."""

from __future__ import annotations

from typing import Any

from edgecompose.evaluation.examples import EvalExample
from edgecompose.evaluation.results import Evaluation, Result
from edgecompose.evaluation.table import evaluation_json
from edgecompose.timing import STAGES

HOSTILE = "</pre><script>alert('x')</script>\"'&{{ 7001 * 7001 }}$x_1$<img src=http://example.org/a.png>"


def answered(task: str, number: int, right: bool, kind: str, prompt: str = "p") -> Result:
    example = EvalExample(task, f"{prompt} {number}", "yes", ("yes", "no"))
    weights = {"base": {}, "own": {task: 1.0}}.get(kind, {task: 0.75, "other": 0.25})
    routed = kind not in ("base", "own")
    return Result(
        example,
        right,
        "yes" if right else "no",
        weights,
        task if routed else None,
        0.75 if routed else None,
        0.5 if routed else None,
        True,
        dict.fromkeys(STAGES, 1.5),
    )


def example_evaluation(names: tuple[str, ...] = ("base", "own", "retrieved"), prompt: str = "p") -> Evaluation:
    def rows(name: str) -> tuple[Result, ...]:
        tasks = ("film", "quiz") if name == "own" else ("film", "quiz", HOSTILE)
        return tuple(answered(t, i, (i + len(name)) % 3 > 0, name, prompt) for t in tasks for i in range(6))

    return Evaluation(names[-1], {name: rows(name) for name in names})


def result_of(evaluation: Evaluation) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "bundle": HOSTILE,
        "limit": None,
        "raw": False,
        "exclude": [],
        "variants": {"base": {"kind": "base"}},
    }
    return evaluation_json(evaluation.summary(), settings)
