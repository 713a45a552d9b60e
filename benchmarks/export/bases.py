"""Real bases, before and after their export."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring.adapters import random_adapter
from benchmarks.measuring.processes import run
from edgecompose.bundle.adapter import adapter_to_bytes, load_adapter
from edgecompose.bundle.records import value_from_json
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import MergeError
from edgecompose.formats.gguf import write_gguf_lora
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings

MODELS = Path(__file__).resolve().parents[2] / "build" / "models"
ADAPTERS, LORA = 3, "blend.gguf"


@dataclass(frozen=True, slots=True)
class Source:
    """A base before its export: a GGUF file, or a Hugging Face folder, which llama.cpp cannot read."""

    name: str
    path: Path

    @property
    def gguf(self) -> Path | None:
        """The file for llama.cpp."""
        return self.path if self.path.suffix == ".gguf" else None

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        files = [self.path] if self.gguf else self.path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)


@dataclass(frozen=True, slots=True)
class Exported:
    """A base after its export, and the random adapters that were made for it."""

    folder: Path
    spec: BaseSpec

    @classmethod
    def open(cls, folder: Path) -> Exported:
        """A folder that `edgecompose-export base` wrote."""
        content = json.loads((folder / "base.json").read_text(encoding="utf-8"))
        return cls(folder, value_from_json(BaseSpec, content, "base.json"))

    def adapters(self, rank: int) -> Path:
        """Folder of the random adapters of a rank."""
        return self.folder / f"adapters-{rank}"

    @property
    def graph_bytes(self) -> int:
        """Size of the graph and its data."""
        graph = self.folder / self.spec.graph
        return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


def find_source(text: str) -> Source:
    """A base by its path or its name below build/models.

    Raises:
        SystemExit: there is none.
    """
    path = Path(text) if Path(text).exists() else MODELS / text
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, path)
    if (path / "config.json").is_file():
        return Source(path.name, path)
    if len(files) == 1:
        return Source(path.name, files[0])
    raise SystemExit(
        f"'{text}' is not a GGUF file, and neither it nor build/models/{text} is a folder with config.json or exactly "
        "one GGUF file; give a path, or run: edgecompose-export fetch NAME -o build/models"
    )


def measure_export(source: Source, precision: str, folder: Path) -> dict[str, Any]:
    """Export in a fresh process; the largest of it and its children counts as its memory."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "edgecompose_export", "base", str(source.path), "--precision", precision]
    done = run([*command, "--accept-distance", "-o", str(folder)])
    spec = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    distance = spec.get("distance") or {}
    return {
        "seconds": done.seconds,
        "peak_mb": done.peak_mb,
        "precision": spec["precision"],
        "files": files,
        "mb": sum(files.values()) / 1e6,
        "source_mb": source.bytes / 1e6,
        "ratio_to_source": sum(files.values()) / source.bytes,
        "kl": distance.get("kl"),
        "top1": distance.get("top1"),
    }


def write_adapters(exported: Exported, rank: int, *, for_llama: bool) -> None:
    """Three random adapters in 4 bits; for llama.cpp also their blend as a LoRA file, if it has the architecture."""
    spec, target = exported.spec, exported.adapters(rank)
    with tempfile.TemporaryDirectory(dir=exported.folder) as name:
        folder = Path(name) / "adapters"
        folder.mkdir()
        for seed in range(ADAPTERS):
            modules = random_adapter(seed, spec.slots, rank=rank, bits=4).modules
            content = adapter_to_bytes(modules, bits=4, base=spec.identity, source={"seed": seed})
            (folder / f"random{seed}.safetensors").write_bytes(content)
        if for_llama:
            try:
                write_gguf_lora(load_blend(spec, folder), folder / LORA, spec)
            except MergeError as error:
                print(f"llama.cpp runs without the blend: {error}", file=sys.stderr)
        folder.rename(target)


def load_blend(spec: BaseSpec, folder: Path) -> MergedAdapter:
    """The adapters of a folder merged at equal weights."""
    files = sorted(folder.glob("*.safetensors"))
    loaded = [load_adapter(path, name=path.stem, groups=spec.slots, base=spec.identity) for path in files]
    return Merger(choose_device("cpu")).merge(loaded, [1 / len(loaded)] * len(loaded), MergeSettings())
