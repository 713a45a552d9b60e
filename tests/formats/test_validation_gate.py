"""Whether an adapter beats the base: verdicts out of an evaluation's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("edgecompose_export", reason="the exporter is not installed")

from edgecompose.bundle.specs import Validation, verdict_of
from edgecompose.errors import ExportError
from edgecompose_export.validation_gate import read_validation


def evaluation() -> dict[str, Any]:
    """What `eval --methods base,own --json` prints, as far as it is read."""

    def scores(a: float, b: float) -> dict[str, Any]:
        return {
            "tasks": {"a": {"n": 150, "accuracy": a, "ci95": [0, 1]}, "b": {"n": 29, "accuracy": b, "ci95": [0, 1]}}
        }

    return {
        "main": "own",
        "variants": {"base": scores(0.4, 0.5), "own": scores(0.6, 0.3)},
        "against": {"base": {"by_task": {"a": {"ci95": [0.1, 0.3]}, "b": {"ci95": [-0.4, -0.02]}}}},
    }


def test_adapters_get_their_verdicts(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(evaluation()), encoding="utf-8")
    assert read_validation(tmp_path / "e.json") == {
        "a": Validation("helps", 150, 0.4, 0.6, (0.1, 0.3)),
        "b": Validation("hurts", 29, 0.5, 0.3, (-0.4, -0.02)),
    }


@pytest.mark.parametrize(
    ("ci95", "expected"),
    [((0.01, 0.2), "helps"), ((-0.2, -0.01), "hurts"), ((-0.1, 0.1), "unproven"), ((0.0, 0.1), "unproven")],
)
def test_verdict(ci95: tuple[float, float], expected: str) -> None:
    assert verdict_of(*ci95) == expected


@pytest.mark.parametrize("missing", ["main", "variants", "against"])
def test_another_json_is_refused(tmp_path: Path, missing: str) -> None:
    result = evaluation()
    del result[missing]
    (tmp_path / "e.json").write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(ExportError, match="--methods base,own --json"):
        read_validation(tmp_path / "e.json")


def test_an_evaluation_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(evaluation() | {"main": "retrieved"}), encoding="utf-8")
    with pytest.raises(ExportError, match="retrieved"):
        read_validation(tmp_path / "e.json")
