"""The command `eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgecompose.timing import STAGES
from tests.cli.calls import call, fault_of, result_of, write_questions
from tests.fixtures_tiny import TASKS

METRICS_KEYS = {"tasks", "mean_accuracy", "mean_ci95", "timings_ms"}


def test_an_evaluation_as_json_has_the_documented_keys(bundle: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    result = result_of("eval", bundle, data, data)  # a file appears twice counts once
    assert set(result) == {"main", *METRICS_KEYS, "settings", "variants", "against"}
    assert result["main"] == "retrieved"
    assert list(result["variants"]) == ["base", "own", "retrieved"]
    for metrics in result["variants"].values():
        assert set(metrics) == {*METRICS_KEYS, "weights", "routing"}
    assert {key: result[key] for key in METRICS_KEYS} == {
        key: result["variants"]["retrieved"][key] for key in METRICS_KEYS
    }
    assert {task: score["n"] for task, score in result["tasks"].items()} == {"birds": 1, **dict.fromkeys(TASKS, 2)}
    assert all(set(score) == {"n", "accuracy", "ci95"} for score in result["tasks"].values())
    assert result["mean_ci95"][0] <= result["mean_accuracy"] <= result["mean_ci95"][1]
    assert tuple(result["timings_ms"]) == STAGES
    assert set(result["against"]) == {"base", "own"}
    assert set(result["against"]["own"]) == {"tasks", "difference", "ci95", "wins", "by_task"}
    assert (result["against"]["own"]["tasks"], result["against"]["base"]["tasks"]) == (3, 4)
    assert set(result["variants"]["retrieved"]["routing"]) == {"confusion", "reliability", "calibration_error"}
    assert result["settings"]["files"] == ["questions.jsonl"] * 2
    assert result["settings"]["variants"]["own"] == {"kind": "own", "method": "product", "norm_guard": False}


def test_every_option_reaches_the_evaluation(bundle: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    options = (
        "--methods",
        "top1, core_ties",
        "--limit",
        1,
        "--exclude-own",
        "--raw",
        "--max-tokens",
        2,
        "--neighbours",
        9,
        "--nucleus",
        1,
        "--routing-temperature",
        0.3,
        "--density",
        0.7,
        "--norm-guard",
        "--exclude",
        "colours",
    )
    result = result_of("eval", bundle, data, *options)
    assert result["main"] == "core_ties"
    assert {task: score["n"] for task, score in result["tasks"].items()} == dict.fromkeys(("birds", *TASKS), 1)
    settings = result["settings"]
    expected = {
        "limit": 1,
        "exclude_own": True,
        "raw": True,
        "max_tokens": 2,
        "neighbours": 9,
        "nucleus": 1.0,
        "routing_temperature": 0.3,
        "exclude": ["colours"],
        "device": "cpu",
        "bundle": "tiny",
    }
    assert {key: settings[key] for key in expected} == expected
    assert settings["variants"]["core_ties"] == {
        "kind": "retrieved",
        "method": "core_ties",
        "density": 0.7,
        "norm_guard": True,
    }
    assert result["variants"]["core_ties"]["weights"]["animals"] == {"numbers": 1.0}
    assert settings["variants"]["top1"]["kind"] == "top1"


def test_an_evaluation_is_a_table(bundle: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    done = call("eval", bundle, data, "--methods", "own,base")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["task", "n", "own", "base"]
    assert [line[0] for line in lines[1:7]] == [*sorted((*TASKS, "birds")), "mean", "95"]
    assert lines[2][2] == "-"
    assert done.stdout.splitlines()[-1].startswith("base less own: ")


def test_a_report_is_written_with_an_answer_cache_beside_it(bundle: Path, tmp_path: Path) -> None:
    data, report = write_questions(tmp_path / "questions.jsonl"), tmp_path / "deep" / "report"
    result = result_of("eval", bundle, data, "--report", report)
    answer_cache = (report / "answers.jsonl").read_bytes()
    assert json.loads((report / "result.json").read_text(encoding="utf-8")) == result
    assert (report / "index.html").is_file()
    again = call("eval", bundle, data, "--report", report)
    assert f"written       {report / 'index.html'}" in again.stdout
    assert (report / "answers.jsonl").read_bytes() == answer_cache
    remaining = tmp_path / "kept.jsonl"
    result_of("eval", bundle, data, "--answer-cache", remaining, "--methods", "base")
    assert len(remaining.read_bytes().splitlines()) == 7


def test_what_cannot_be_evaluated_is_a_fault(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    assert str(tmp_path / "absent.jsonl") in fault_of("eval", bundle, tmp_path / "absent.jsonl")
    bad = write_questions(tmp_path / "bad.jsonl", {"prompt": "x"})
    assert f"{bad}:8 has no answer" in fault_of("eval", bundle, data, bad)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "no example remains for 'retrieved'" in fault_of("eval", bundle, empty)
    assert "is no answer of an evaluation" in fault_of("eval", bundle, data, "--answer-cache", data)
    assert "no task 'fish'" in fault_of("eval", bundle, data, "--exclude", "fish")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "edgecompose[report]" in fault_of("eval", bundle, data, "--report", tmp_path / "report")
    assert not (tmp_path / "report").exists()
