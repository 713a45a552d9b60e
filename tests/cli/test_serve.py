"""The commands `serve` and `batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgecompose.server.config import ServerSettings
from tests.cli.calls import PROMPT, call, fault_of, result_of


def test_batch_answers_a_file_and_is_resumable(bundle: Path, tmp_path: Path) -> None:
    calls, output = tmp_path / "calls.jsonl", tmp_path / "results.jsonl"
    body = {"prompt": PROMPT, "max_tokens": 2}
    lines = [{"custom_id": name, "url": "/v1/completions", "body": body} for name in "ab"]
    calls.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    result = result_of("batch", bundle, calls, "-o", output)
    assert (result["calls"], result["answered"], result["failed"]) == (2, 2, 0)
    assert [json.loads(line)["custom_id"] for line in output.read_text(encoding="utf-8").splitlines()] == ["a", "b"]
    assert result_of("batch", bundle, calls, "-o", output)["answered"] == 0
    calls.write_text("{", encoding="utf-8")
    assert "calls.jsonl:1 is not JSON" in fault_of("batch", bundle, calls, "-o", output)


def test_options_of_serve_reach_the_server(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[ServerSettings, dict[str, Any]]] = []
    monkeypatch.setattr(
        "edgecompose.cli.serve.run_server", lambda composer, settings, **options: started.append((settings, options))
    )
    key = tmp_path / "key"
    key.write_text("k" * 16, encoding="utf-8")
    options = ["--host", "0.0.0.0", "--port", "0", "--allow-host", "Work.local", "--allow-origin", "http://a.b"]
    done = call(
        "serve",
        bundle,
        *options,
        "--api-key-file",
        key,
        "--workers",
        2,
        "--queue",
        3,
        "--max-tokens",
        7,
        "--active",
        4,
        "--model-alias",
        "gpt",
    )
    assert done.exit_code == 0, done.output
    ((settings, addresses),) = started
    assert "work.local" in settings.hosts and settings.origins == ("http://a.b",) and settings.key == "k" * 16
    assert (settings.workers, settings.active, settings.queue, settings.calls.max_tokens) == (2, 4, 3, 7)
    assert settings.aliases == ("gpt",)
    assert (addresses["host"], addresses["port"]) == ("0.0.0.0", 0)


def test_lines_on_standard_input_are_answered(bundle: Path) -> None:
    line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "models"}).encode() + b"\n"
    done = call("serve", bundle, "--stdio", stdin=b"x" * 3_000_000 + b"\n" + line)
    assert done.exit_code == 0, done.output
    long, models = map(json.loads, done.stdout.splitlines())
    assert "longer than" in long["error"]["message"]
    assert models["result"]["models"][:2] == ["auto", "base"]
