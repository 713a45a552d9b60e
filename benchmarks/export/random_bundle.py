"""A bundle of an exported base with random adapters."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.export.bases import Exported
from benchmarks.measuring.adapters import gaussian_adapter
from benchmarks.measuring.prompts import TASK_PROMPTS
from edgecompose.bundle.adapter import adapter_to_bytes
from edgecompose_export.bundles import build_bundle

#: Weights of the three adapters that a task is mapped to.
_WEIGHTS = (0.5, 0.3, 0.2)


def write_bundle(base: Path, embedder: Path, target: Path, *, rank: int) -> Path:
    """Write the bundle, in the place of an older one: a task for each of TASK_PROMPTS, with an adapter of its own.

    Args:
        base: a folder of `edgecompose-export base`.
        embedder: a folder of `edgecompose-export embedder`.
    """
    names = [f"random{number}" for number in range(len(TASK_PROMPTS))]
    spec = Exported.open(base).spec
    lines = [f"name = {json.dumps(target.name)}", f"base = {_quoted(base)}", f"embedder = {_quoted(embedder)}"]
    lines += ["[defaults.retrieval]", "neighbours = 2"]  # those of one task: a blend of three adapters
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        for number, (task, prompt) in enumerate(zip(names, TASK_PROMPTS, strict=True)):
            modules = gaussian_adapter(task, spec.slots, rank=rank, bits=4).modules
            content = adapter_to_bytes(modules, bits=4, base=spec.identity, source={"seed": task})
            (work / f"{task}.safetensors").write_bytes(content)
            examples = [{"prompt": text, "answer": "yes"} for text in (prompt, f"Please answer.\n{prompt}")]
            (work / f"{task}.jsonl").write_text("\n".join(map(json.dumps, examples)) + "\n", encoding="utf-8")
            others = [names[(number + step) % len(names)] for step in range(len(_WEIGHTS))]
            mapped = ", ".join(f"{other} = {weight}" for other, weight in zip(others, _WEIGHTS, strict=True))
            lines += [f"[tasks.{task}]", f'adapter = "{task}.safetensors"', f'examples = "{task}.jsonl"']
            lines += [f"adapters = {{ {mapped} }}"]
        (work / "recipe.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        build_bundle(work / "recipe.toml", target, force=True)
    return target


def _quoted(path: Path) -> str:
    return json.dumps(str(path.resolve()))
