"""Everything that EdgeCompose writes, on tiny models: how each begins, what it runs, and what may be there afterwards.

Parts (models, adapters, a bundle) are made once, by `make_parts`. A case is a copy of what `prepare` makes of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgecompose import Request, open_bundle
from edgecompose.adapters import convert_adapter
from edgecompose.bundle.atomic import UNFINISHED
from edgecompose.bundle.files import Bundle, verify
from edgecompose.bundle.manifest import MANIFEST_FILE
from edgecompose.bundle.upgrade import upgrade_bundle
from edgecompose.evaluation.examples import EvalExample
from edgecompose.evaluation.runner import evaluate, parse_variants
from edgecompose.formats.checkpoint import open_checkpoint
from edgecompose.formats.registry import FORMATS
from edgecompose.server.batch import BatchCall, answer_calls
from edgecompose.tasks import add_task, remove_task
from tests.bundle.test_upgrade import as_version_4
from tests.fixtures_tiny import NEW_PROMPTS, TASKS

#: What may be there after a writer was ended: 'whole' the old files or the new ones; 'bundle' the old or the new
#: bundle, and files that nothing names; 'lines' a beginning of the new lines; 'resumable' what the next run continues.
Kind = Literal["whole", "bundle", "lines", "resumable"]
#: What a run of `train` goes on from, which is removed when the adapter is there.
_STATE = "training-state.pt"
_LEFTOVER = re.compile(r"\..*\.(tmp|old|lock)")
_BLEND = Request(weights={"animals": 1.0, "numbers": 0.5})


@dataclass(frozen=True, slots=True)
class Writer:
    """One of them.

    Attributes:
        prepare: fills a new folder of a case; its second argument are the parts.
        run: writes in that folder.
        output: the file or folder that is written.
        again: whether it succeeds where it has succeeded before; else it refuses.
        cost: seconds or so.
        modules: what is imported before the first process is forked, since that takes longer than all the rest.
    """

    name: str
    prepare: Callable[[Path, Path], None]
    run: Callable[[Path, Path], object]
    output: str
    kind: Kind = "whole"
    again: bool = False
    cost: float = 0.1
    modules: tuple[str, ...] = ()


def make_parts(root: Path) -> None:
    """Make all parts, unless they are there."""
    if (root / "smaller.toml").exists():
        return
    from tests import tiny
    from tests.fixtures_tiny import TinyZoo

    zoo = TinyZoo(root)
    zoo.bundle()
    zoo.lora("travel", r=2, target_modules=["o_proj"])
    zoo.encoder()
    if not (root / "tasks" / "travel.jsonl").exists():
        tiny.write_task(root / "tasks" / "travel.jsonl", NEW_PROMPTS)
    text = (root / "tiny.toml").read_text(encoding="utf-8")
    (root / "smaller.toml").write_text(text[: text.index("[tasks.colours]")], encoding="utf-8")


def outcome(root: Path, writer: Writer) -> Any:
    """What a writer's output is: nothing (None), or a value that is equal for equal results.

    Raises:
        AssertionError: it is something half.
    """
    path = root / writer.output
    if not path.exists():
        return None
    if writer.kind == "bundle" or (path / MANIFEST_FILE).exists():
        faults = [] if is_version_4(path) else verify(path)
        assert not [fault for fault in faults if "is not in the manifest" not in fault], faults
        return (path / MANIFEST_FILE).read_text(encoding="utf-8")
    if writer.kind == "lines":
        return [_line(line) for line in path.read_bytes().split(b"\n")[:-1]]
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    files = {n: p for n, p in files.items() if not _LEFTOVER.search(n) and n not in (UNFINISHED, _STATE)}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items()}


def is_version_4(bundle: Path) -> bool:
    """Whether a bundle has a manifest of version 4, whole."""
    return bool(json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))["schema_version"] == 4)


def names(root: Path) -> list[str]:
    """What lies in the folder of a case."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def _line(line: bytes) -> Any:
    """A line of results without what differs from run to run."""
    value = json.loads(line)
    if "cached" in value:
        value["cached"].pop("timings_ms")
        return value
    for part in (value, value["response"], value["response"]["body"]):
        for name in ("id", "request_id", "created"):
            part.pop(name, None)
    body = value["response"]["body"]
    body.pop("edgecompose", None)
    return value


def _nothing(root: Path, parts: Path) -> None:
    pass


def _a_bundle(root: Path, parts: Path) -> None:
    shutil.copytree(parts / "bundle", root / "bundle")


def _an_old_bundle(root: Path, parts: Path) -> None:
    _a_bundle(root, parts)
    path = root / "bundle" / MANIFEST_FILE
    path.write_text(json.dumps(as_version_4(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def _folder_with_notes(root: Path, parts: Path) -> None:
    (root / "out").mkdir()
    (root / "out" / "notes.txt").write_text("mine", encoding="utf-8")


def _build(recipe: str, force: bool) -> Callable[[Path, Path], object]:
    def run(root: Path, parts: Path) -> None:
        from edgecompose_export.bundles import build_bundle

        build_bundle(parts / recipe, root / "bundle", force=force)

    return run


def _add(root: Path, parts: Path) -> None:
    add_task(root / "bundle", "travel", parts / "lora/llama/travel", parts / "tasks/travel.jsonl")


def _adapter(root: Path, parts: Path) -> None:
    convert_adapter(parts / "lora/llama/travel", Bundle(parts / "bundle").manifest.base, root / "out.safetensors")


def _examples(root: Path, parts: Path) -> None:
    from edgecompose.retrieval.examples import read_examples
    from edgecompose_export.embedder import open_embedder
    from edgecompose_export.examples import write_examples

    embedder, spec = open_embedder(parts / "embedders/bert-f32-4")
    tasks = {name: read_examples(parts / "tasks" / f"{name}.jsonl") for name in TASKS}
    write_examples(tasks, embedder, spec, root / "out", keep_text=True)


def _compose(name: str, output: str) -> Callable[[Path, Path], object]:
    def run(root: Path, parts: Path) -> None:
        row = FORMATS[name]
        with open_bundle(parts / "bundle", device="cpu") as composer:
            merged, base = composer.compose("x", _BLEND).merged, composer.bundle.manifest.base
            if row.write_into is not None:
                row.write_into(merged, open_checkpoint(parts / "models/llama"), root / output, base, lambda n: None)
            elif row.write is not None:
                row.write(merged, root / output, base)

    return run


def _batch(root: Path, parts: Path) -> None:
    bodies = [{"prompt": f"{prompt} {i}", "max_tokens": 2} for i, prompt in enumerate(TASKS["animals"] * 2)]
    calls = [BatchCall(str(i), "/v1/completions", body) for i, body in enumerate(bodies)]
    with open_bundle(parts / "bundle", device="cpu") as composer:
        answer_calls(composer, calls, root / "results.jsonl", max_tokens=8, parallel=1)


def _eval(root: Path, parts: Path) -> None:
    examples = [EvalExample(task, prompt, "yes", ("yes", "no")) for task, rows in TASKS.items() for prompt in rows[:2]]
    with open_bundle(parts / "bundle", device="cpu") as composer:
        evaluate(
            composer, examples, parse_variants(["base", "retrieved"], Request()), answer_cache=root / "answers.jsonl"
        )


def _train(root: Path, parts: Path) -> None:
    import torch

    from edgecompose.retrieval.examples import Example
    from edgecompose_export.base.source import open_base
    from edgecompose_export.training.batches import TrainSettings
    from edgecompose_export.training.train import train_adapter

    torch.set_num_threads(1)
    settings = TrainSettings(rank=2, alpha=4, epochs=15, batch=4, max_length=64, prompt_form="raw")
    examples = [Example(f"{a} and {b}?", "yes" if a < b else "no") for a in range(3) for b in range(2)]
    train_adapter(open_base(parts / "models/llama"), examples, root / "out", settings)


def _base(root: Path, parts: Path) -> None:
    from edgecompose_export.base.export import export_base

    export_base(parts / "models/llama", root / "out", "fp32", accept_distance=True)


def _embedder(root: Path, parts: Path) -> None:
    from edgecompose_export.embedder import export_embedder

    export_embedder(parts / "encoders/bert", root / "out", "f32", ends=4)


_EXPORT = ("edgecompose_export.bundles", "edgecompose_export.examples")
_TORCH = ("torch", "transformers", "transformers.models.llama.modeling_llama")
_TRAIN = (*_TORCH, "peft", "edgecompose_export.training.train")
WRITERS: tuple[Writer, ...] = (
    Writer("bundle", _nothing, _build("tiny.toml", False), "bundle", cost=0.3, modules=_EXPORT),
    Writer("bundle --force", _a_bundle, _build("smaller.toml", True), "bundle", again=True, cost=0.3, modules=_EXPORT),
    Writer("add-task", _a_bundle, _add, "bundle", "bundle"),
    Writer("remove-task", _a_bundle, lambda root, parts: remove_task(root / "bundle", "animals"), "bundle", "bundle"),
    Writer("upgrade", _an_old_bundle, lambda root, parts: upgrade_bundle(root / "bundle"), "bundle", again=True),
    Writer("adapter", _nothing, _adapter, "out.safetensors"),
    Writer("examples", _nothing, _examples, "out", modules=_EXPORT),
    Writer("examples into folder", _folder_with_notes, _examples, "out", modules=_EXPORT),
    Writer("compose peft", _nothing, _compose("peft", "out"), "out"),
    Writer("compose peft into folder", _folder_with_notes, _compose("peft", "out"), "out"),
    Writer("compose gguf", _nothing, _compose("gguf", "out.gguf"), "out.gguf"),
    Writer("compose onnx-adapter", _nothing, _compose("onnx-adapter", "out.onnx_adapter"), "out.onnx_adapter"),
    Writer("compose merged", _nothing, _compose("merged", "out"), "out"),
    Writer("batch", _nothing, _batch, "results.jsonl", "lines", again=True, cost=0.3),
    Writer("eval", _nothing, _eval, "answers.jsonl", "lines", again=True, cost=0.3),
    Writer("train", _nothing, _train, "out", "resumable", again=True, cost=2, modules=_TRAIN),
    Writer("base", _nothing, _base, "out", cost=1, modules=("edgecompose_export.base.export",)),
    Writer("embedder", _nothing, _embedder, "out", cost=4, modules=(*_TORCH, "optimum.exporters.onnx")),
)
