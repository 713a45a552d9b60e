"""Session-wide tiny models, exports and a bundle, each made once, when a test first asks for it.

Nothing of torch is imported before that, so tests that need none of it run where it is not installed.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgecompose.bundle.specs import BaseSpec, EmbedderSpec

_REASON = "exports need the packages of edgecompose-export"
#: Prompts of the tiny bundle's tasks. A prompt is its own nearest neighbour, whatever the encoder's weights.
TASKS = {
    "animals": ("the cat sat on a mat", "a dog barks at night", "seven horses in the rain", "bees make honey"),
    "numbers": ("two and two is four", "what is 12 times 9?", "count from one to ten", "the root of 81 is 9"),
    "colours": ("the sky is blue at noon", "mix red with yellow", "grass grows green", "a white page", "pitch black"),
}
NEW_PROMPTS = ("where is the station?", "which train is late?", "a ticket to the sea")
#: LoRA settings of the adapter of each task: different ranks, scales and modules.
ADAPTERS: dict[str, dict[str, Any]] = {
    "animals": {"r": 4, "lora_alpha": 8},
    "numbers": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "colours": {"r": 4, "lora_alpha": 4, "layers_to_transform": [1], "target_modules": ["k_proj", "up_proj"]},
}


@dataclass(frozen=True)
class Exported:
    """An exported base."""

    folder: Path
    spec: BaseSpec


class TinyZoo:
    """Makes tiny models and what is exported from them; the same request twice gives the same files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def model(self, architecture: str) -> Path:
        """A Hugging Face folder; see `tiny.ARCHITECTURES`."""
        from tests import tiny

        return self._once(self.root / "models" / architecture, lambda path: tiny.write_model(path, architecture))

    def base(self, architecture: str, precision: Any = "fp32") -> Exported:
        """The exported base, however far a precision is from float32."""
        from edgecompose_export.base.export import export_base
        from edgecompose_export.base.spec import read_base_spec

        source = self.model(architecture)
        folder = self._once(
            self.root / f"{architecture}-{precision}",
            lambda path: export_base(source, path, precision, accept_distance=True),
        )
        return Exported(folder, read_base_spec(folder))

    def lora(self, name: str, architecture: str = "llama", **settings: Any) -> Path:
        """A PEFT folder; its name is its seed."""
        from tests import tiny

        seed = sum(map(ord, name))
        return self._once(
            self.root / "lora" / architecture / name,
            lambda path: tiny.write_lora(path, self.model(architecture), seed=seed, **settings),
        )

    def encoder(self, **settings: Any) -> Path:
        """A sentence-transformers folder."""
        from tests import tiny

        name = "-".join(["bert", *map(str, settings.values())])
        return self._once(self.root / "encoders" / name, lambda path: tiny.write_encoder(path, **settings))

    def embedder(self, precision: Any = "f32", *, ends: int = 4, **settings: Any) -> tuple[Path, EmbedderSpec]:
        """An exported embedder."""
        from edgecompose_export.embedder import export_embedder, read_embedder_spec

        source = self.encoder(**settings)
        folder = self.root / "embedders" / f"{source.name}-{precision}-{ends}"
        with warnings.catch_warnings():
            ignore_tracer_warnings()
            self._once(folder, lambda path: export_embedder(source, path, precision, ends=ends))
        return folder, read_embedder_spec(folder)

    def task(self, name: str) -> Path:
        """The examples of one of TASKS as JSONL."""
        from tests import tiny

        (self.root / "tasks").mkdir(exist_ok=True)
        return self._once(self.root / "tasks" / f"{name}.jsonl", lambda path: tiny.write_task(path, TASKS[name]))

    def recipe(self) -> Path:
        """The recipe of a bundle of all TASKS."""
        return self._once(self.root / "tiny.toml", self._write_recipe)

    def bundle(self) -> Path:
        """The bundle of `recipe`. Do not change it: take the fixture `bundle_copy` for that."""
        from edgecompose_export.bundles import build_bundle

        recipe = self.recipe()
        return self._once(self.root / "bundle", lambda path: build_bundle(recipe, path))

    def _write_recipe(self, path: Path) -> None:
        base, (embedder, _) = self.base("llama").folder, self.embedder()
        lines = [
            'name = "tiny"',
            f'base = "{base.name}"',
            f'embedder = "embedders/{embedder.name}"',
            "bits = 8",
            "keep_text = true",
            "[defaults]",
            "max_tokens = 6",
            "[defaults.retrieval]",
            "neighbours = 4",
        ]
        for name in TASKS:
            adapter, examples = self.lora(name, **ADAPTERS[name]), self.task(name)
            places = f'adapter = "{adapter.relative_to(self.root)}"\nexamples = "{examples.relative_to(self.root)}"'
            lines.append(f"[tasks.{name}]\n{places}")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @staticmethod
    def _once(path: Path, make: Callable[[Path], object]) -> Path:
        if not path.exists():
            make(path)
        return path


def ignore_tracer_warnings() -> None:
    """Torch's tracer warns of constants while optimum exports; not ours to mend."""
    from torch.jit import TracerWarning

    warnings.simplefilter("ignore", TracerWarning)
    warnings.simplefilter("ignore", DeprecationWarning)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyZoo]:
    """Tiny models on demand."""
    for package in ("torch", "transformers", "peft", "optimum"):
        pytest.importorskip(package, reason=_REASON)
    import torch

    root = tmp_path_factory.mktemp("zoo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = TinyZoo(root)
    yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bundle(zoo: TinyZoo) -> Path:
    """The tiny bundle, not to be changed."""
    return zoo.bundle()


@pytest.fixture
def bundle_copy(bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle, to be changed."""
    return shutil.copytree(bundle, tmp_path / "copy")


@pytest.fixture
def new_task(zoo: TinyZoo, tmp_path: Path) -> tuple[Path, Path]:
    """A PEFT folder and examples of a task that the tiny bundle lacks."""
    from tests import tiny

    examples = tiny.write_task(tmp_path / "travel.jsonl", NEW_PROMPTS)
    return zoo.lora("travel", r=2, target_modules=["o_proj"]), examples


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files, in the order in which they were flushed; the disk itself is spared (it may take seconds)."""
    names: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: names.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    return names
