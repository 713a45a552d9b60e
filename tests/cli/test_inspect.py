"""The commands `inspect`, `verify` and `doctor`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgecompose.bundle.files import read_manifest
from tests.cli.calls import PROMPT, call, fault_of, result_of
from tests.fixtures_tiny import ADAPTERS, TASKS


def test_inspect_describes_a_bundle(bundle: Path) -> None:
    result = result_of("inspect", bundle)
    manifest = read_manifest(bundle)
    assert set(result) == {
        "name",
        "schema_version",
        "created_by",
        "bytes",
        "files",
        "base",
        "embedder",
        "tasks",
        "adapters",
        "defaults",
    }
    assert (result["name"], result["schema_version"], result["files"]) == ("tiny", 5, len(manifest.files))
    assert result["bytes"] == sum((bundle / name).stat().st_size for name in manifest.files)
    assert {name: task["examples"] for name, task in result["tasks"].items()} == {n: len(p) for n, p in TASKS.items()}
    assert {name: a["rank"] for name, a in result["adapters"].items()} == {name: a["r"] for name, a in ADAPTERS.items()}
    assert result["defaults"]["retrieval"]["neighbours"] == 4
    text = call("inspect", bundle)
    assert text.exit_code == 0
    assert all(name in text.stdout for name in (*TASKS, "llama", "fp32", "q_proj"))


def test_verify_lists_all_faults(bundle_copy: Path) -> None:
    manifest = read_manifest(bundle_copy)
    size = sum(entry.bytes for entry in manifest.files.values())
    assert result_of("verify", bundle_copy) == {
        "bundle": str(bundle_copy),
        "files": len(manifest.files),
        "bytes": size,
        "problems": [],
    }
    assert "no fault found" in call("verify", bundle_copy).stdout
    (bundle_copy / "adapters/animals.safetensors").unlink()
    (bundle_copy / "base/tokenizer.json").write_text("{}", encoding="utf-8")
    done = call("verify", bundle_copy)
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 2
    assert "adapters/animals.safetensors' is missing" in done.stdout
    as_json = call("verify", bundle_copy, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["problems"] == done.stdout.splitlines()


def test_doctor_reports_the_installation() -> None:
    done = call("doctor", "--json")
    result = json.loads(done.stdout)
    assert set(result) == {
        "python",
        "platform",
        "versions",
        "onnxruntime_packages",
        "available_providers",
        "device",
        "telemetry_disabled",
        "problems",
    }
    assert done.exit_code == (1 if result["problems"] else 0)
    assert result["telemetry_disabled"] is True
    assert set(result["versions"]) == {"onnxruntime", "usearch", "numpy"}
    assert "CPUExecutionProvider" in result["available_providers"]
    assert call("doctor").stdout.startswith("python ")


def test_doctor_fails_when_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1", "onnxruntime-gpu": "2"}
    monkeypatch.setattr("edgecompose.engine.device.installed_packages", lambda: both)
    monkeypatch.setattr("edgecompose.engine.device.telemetry_disabled", lambda: False)
    done = call("doctor")
    assert done.exit_code == 1
    assert "onnxruntime and onnxruntime-gpu are both installed" in done.stdout
    assert "telemetry is not switched off" in done.stdout
    assert len(json.loads(call("doctor", "--json").stdout)["problems"]) == 2


def test_cuda_that_is_not_there_is_an_error_that_says_why(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("edgecompose.engine.device", "edgecompose.cli.main"):
        monkeypatch.setattr(f"{place}.available_providers", lambda: ("CPUExecutionProvider",), raising=False)
    for command in ("run", "retrieve"):
        message = fault_of(command, bundle, PROMPT, "--device", "cuda")
        assert re.search(r"device cuda cannot be used: .*onnxruntime .*CUDA.*--device cpu", message)
    result = result_of("run", bundle, PROMPT, "--device", "auto")["device"]
    assert result["kind"] == "cpu"
    assert re.search(r"auto fell back to cpu: .*onnxruntime ", result["reason"])
    assert result_of("run", bundle, PROMPT, "--device", "cpu")["device"]["reason"] == "cpu was requested"
