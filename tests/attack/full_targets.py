"""Targets that open the tiny bundle, retrieve, merge, and run the base: each file damaged, its hash made right again.

An accepted case must give finite scores. Where only the manifest changed, in fields that explain no other answer, the
neighbours, weights and text must be those of the whole bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from edgecompose import Request, open_bundle
from edgecompose.bundle.files import describe_file
from edgecompose.bundle.manifest import MANIFEST_FILE
from tests.attack.bundle_targets import mutate_tensors
from tests.attack.mutations import mutate_bytes, mutate_json_text, write_text
from tests.attack.target import Target
from tests.fixtures_tiny import TASKS, TinyZoo

ROOT = Path(__file__).parents[2]
PROMPT, CHOICES = TASKS["animals"][0], ("yes", "no")
BUNDLE, BEFORE, REFERENCE = "bundle", "before.json", "reference.json"
#: What another answer may come from, by the beginning of a field's place.
_EXPLAINS = ("defaults.", "tasks.", "adapters.", "base.end_tokens", "base.long_from", "base.chat_template", "embedder.")
_SECONDS = 30.0


def tiny_bundle() -> Path:
    """The tiny bundle, built once for each state of the code that writes it, in the project's build folder."""
    sources = sorted([*(ROOT / "export").rglob("*.py"), *(ROOT / "edgecompose").rglob("*.py"), ROOT / "tests/tiny.py"])
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    place = ROOT / "build" / "attack" / f"tiny-{state}"
    if not place.exists():
        work = place.with_name(f"{place.name}.{os.getpid()}")
        shutil.copytree(TinyZoo(work / "zoo").bundle(), work / "bundle")
        (work / "bundle").rename(place)
        shutil.rmtree(work)
    return place


def prepare_from(bundle: Path, folder: Path) -> None:
    """A copy of a bundle, and what it answers."""
    shutil.copytree(bundle, folder / BUNDLE)
    shutil.copy(bundle / MANIFEST_FILE, folder / BEFORE)
    write_text(folder / REFERENCE, json.dumps(_answer(folder / BUNDLE)))


def _prepare(folder: Path) -> None:
    prepare_from(tiny_bundle(), folder)


def _answer(bundle: Path) -> dict[str, Any]:
    """What a bundle says to one prompt: neighbours, weights, scores of choices, and a token of text."""
    with open_bundle(bundle, device="cpu") as composer:
        scores = composer.score(PROMPT, CHOICES, Request(raw=True))
        answer = composer.run(PROMPT, Request(max_tokens=1))
    assert all(map(math.isfinite, scores.values())), f"the scores are {scores}"
    retrieval = answer.retrieval
    similarities = [neighbour.similarity for neighbour in retrieval.neighbours]
    assert all(map(math.isfinite, (*similarities, *retrieval.weights.values()))), "a similarity is not finite"
    return {
        "neighbours": [[n.task, n.key] for n in retrieval.neighbours],
        "weights": dict(retrieval.weights),
        "scores": scores,
        "text": answer.text,
    }


def _attempt(folder: Path) -> str:
    _answer(folder / BUNDLE)
    return "accepted"


def _attempt_manifest(folder: Path) -> str:
    """The answer is the whole bundle's, unless a field that changed explains another one."""
    before = json.loads((folder / BEFORE).read_text(encoding="utf-8"))
    answer = _answer(folder / BUNDLE)
    after = json.loads((folder / BUNDLE / MANIFEST_FILE).read_text(encoding="utf-8-sig"))
    changed = _differences(before, after)
    if not any(place.startswith(_EXPLAINS) for place in changed):
        reference = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))
        assert answer == reference, f"{changed} do not explain {answer}"
    return "accepted"


def _differences(one: Any, other: Any, place: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(set(one) | set(other))
        return [d for key in keys for d in _differences(one.get(key), other.get(key), f"{place}{key}.")]
    return [] if one == other else [place]


def rehash(bundle: Path, name: str) -> None:
    """Write the hash of a file that changed into the manifest."""
    path = bundle / MANIFEST_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["files"][name] = dataclasses.asdict(describe_file(bundle / name))
    write_text(path, json.dumps(fields))


def _damage(find: Callable[[dict[str, Any]], str], change: Callable[[random.Random, Path], None]) -> Any:
    """Damage of one file of the bundle, with its hash made right."""

    def mutate(rng: random.Random, folder: Path) -> None:
        bundle = folder / BUNDLE
        name = find(json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8")))
        change(rng, bundle / name)
        rehash(bundle, name)

    return mutate


def _bytes(rng: random.Random, path: Path) -> None:
    path.write_bytes(mutate_bytes(rng, path.read_bytes()))


def _json(rng: random.Random, path: Path) -> None:
    write_text(path, mutate_json_text(rng, path.read_text(encoding="utf-8")))


def _values(rng: random.Random, path: Path) -> None:
    """A tensor's bytes become numbers that are too large or not finite, or random ones."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content) // 4) * 4
        word = rng.choice((b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f", rng.randbytes(4)))
        count = rng.choice((1, 1, 16, 400))
        content[place : place + 4 * count] = (word * count)[: len(content) - place]
    path.write_bytes(bytes(content))


def _graph(rng: random.Random, path: Path) -> None:
    """A graph as bytes, or with other operators, inputs, attributes, types, shapes and places of data."""
    if rng.random() < 0.3:
        _bytes(rng, path)
        return
    model = onnx.load(path, load_external_data=False)
    for _ in range(rng.randint(1, 2)):
        _change_graph(rng, model.graph)
    path.write_bytes(model.SerializeToString())


def _change_graph(rng: random.Random, graph: Any) -> None:
    node, kind = rng.choice(graph.node), rng.randrange(8)
    names = [name for other in graph.node for name in other.output]
    if kind == 0:
        node.op_type = rng.choice(graph.node).op_type
    elif kind == 1 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == 2 and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i, attribute.f = rng.choice((0, 1, -1, 3, 1 << 31, 1 << 62)), rng.choice((0.0, 1e38, math.nan, -1.0))
    elif kind == 3:
        graph.node.remove(node)
    elif kind == 4 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        if tensor.external_data:
            entry = rng.choice(tensor.external_data)
            entry.value = rng.choice(("0", "1", "64", str(1 << 40), "-1", "other.data", entry.value))
        elif tensor.raw_data:
            tensor.raw_data = mutate_bytes(rng, tensor.raw_data)
    elif kind == 5 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, 2, -1, 1 << 40))
    elif kind == 6:
        value = rng.choice([*graph.output, *graph.input])
        value.type.tensor_type.elem_type = rng.randrange(1, 17)
    else:
        dims = rng.choice([*graph.output, *graph.input]).type.tensor_type.shape.dim
        if dims:
            dims[rng.randrange(len(dims))].dim_value = rng.choice((0, 1, 7, 1 << 31))


def _mutate_manifest(rng: random.Random, folder: Path) -> None:
    path = folder / BUNDLE / MANIFEST_FILE
    write_text(path, mutate_json_text(rng, path.read_text(encoding="utf-8")))


def _play_tricks(rng: random.Random, folder: Path) -> None:
    """A file becomes something else: a pipe, a folder, a link, another file, or nothing."""
    bundle = folder / BUNDLE
    for _ in range(rng.randint(1, 2)):
        files = sorted(path for path in bundle.rglob("*") if path.is_file() and not path.is_symlink())
        path = rng.choice([*files, bundle / MANIFEST_FILE])
        content = path.read_bytes() if path.is_file() else b""
        path.unlink(missing_ok=True)
        kind = rng.randrange(9)
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            path.mkdir()
        elif kind == 2:
            path.symlink_to(rng.choice(("/dev/zero", "/dev/stdin", "/etc/passwd", "/nowhere", path.name, "..", ".")))
        elif kind == 3:
            (folder / "outside").write_bytes(content)
            path.symlink_to("../" * len(path.relative_to(bundle).parts) + "outside")
        elif kind == 4:
            inside = path.with_name("inside")
            inside.write_bytes(content)
            path.symlink_to("inside")
        elif kind == 5:
            path.write_bytes(content[: rng.randrange(len(content) + 1)])
        elif kind == 6:
            path.symlink_to(rng.choice(files).name)
        elif kind == 7:
            shutil.copy(rng.choice([file for file in files if file.is_file()] or [folder / REFERENCE]), path)


def _full(name: str, mutate: Any, attempt: Callable[[Path], str] = _attempt) -> Target:
    return Target(name, "full", _prepare, mutate, attempt, seconds=_SECONDS)


def _adapter(fields: dict[str, Any]) -> str:
    return str(fields["adapters"]["animals"]["file"])


def _of(part: str, field: str, suffix: str = "") -> Callable[[dict[str, Any]], str]:
    return lambda fields: f"{fields[part][field]}{suffix}"


TARGETS = (
    _full("full-manifest", _mutate_manifest, _attempt_manifest),
    _full("full-decoder", _damage(_of("base", "graph"), _graph)),
    _full("full-encoder", _damage(_of("embedder", "graph"), _graph)),
    _full("full-data", _damage(_of("base", "graph", ".data"), _values)),
    _full("full-tokenizer", _damage(_of("base", "tokenizer"), _json)),
    _full("full-words", _damage(_of("embedder", "tokenizer"), _json)),
    _full("full-index", _damage(_of("index", "file"), _bytes)),
    _full("full-adapter", _damage(_adapter, mutate_tensors)),
    _full("full-files", _play_tricks),
)
