"""Bundles that somebody damaged: one error that names the file, before native code reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgecompose import EdgeComposeError, Request
from edgecompose.bundle.files import read_manifest, verify
from edgecompose.bundle.manifest import MANIFEST_FILE
from edgecompose.errors import FileDamaged
from edgecompose.tasks import add_task, remove_task
from tests import tiny
from tests.recipes import NEAREST, PROMPT, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("synced")]


def _index_of(root: Path) -> str:
    return read_manifest(root).index.file


USED: dict[str, Callable[[Path], str]] = {
    "index": _index_of,
    "decoder": lambda root: "base/decoder.onnx",
    "decoder data": lambda root: "base/decoder.onnx.data",
    "tokenizer": lambda root: "base/tokenizer.json",
    "chat template": lambda root: "base/chat_template.jinja",
    "encoder": lambda root: "embedder/encoder.onnx",
    "encoder's tokenizer": lambda root: "embedder/tokenizer.json",
    "adapter": lambda root: "adapters/animals.safetensors",
}


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("part", USED)
def test_one_flipped_bit_anywhere_is_one_error(bundle_copy: Path, part: str, place: float) -> None:
    name = USED[part](bundle_copy)
    content = bytearray((bundle_copy / name).read_bytes())
    content[round(place * (len(content) - 1))] ^= 0x10
    (bundle_copy / name).write_bytes(content)
    with pytest.raises(FileDamaged, match=f"'{name}' has sha256"):
        run(bundle_copy, PROMPT, NEAREST)
    (fault,) = verify(bundle_copy)
    assert name in fault


LIES: dict[str, tuple[str, Any]] = {
    "key-value heads": ("base.kv_heads", 4),
    "head size": ("base.head_size", 32),
    "vocabulary": ("base.vocabulary", 301),
    "another graph": ("base.graph", "embedder/encoder.onnx"),
    "another encoder": ("embedder.graph", "base/decoder.onnx"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_manifest_that_disagrees_with_a_graph_is_one_error(bundle_copy: Path, case: str) -> None:
    path, value = LIES[case]
    part, field = path.split(".")
    manifest = json.loads((bundle_copy / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest[part][field] = value
    tiny.write_json(bundle_copy / MANIFEST_FILE, manifest)
    with pytest.raises(EdgeComposeError):
        run(bundle_copy)


def test_damage_to_what_is_not_used_does_not_matter(bundle_copy: Path) -> None:
    path = bundle_copy / "adapters/colours.safetensors"
    path.write_bytes(bytes(len(path.read_bytes())))
    assert run(bundle_copy, PROMPT, NEAREST).text == run(bundle_copy, PROMPT, NEAREST).text
    with pytest.raises(FileDamaged, match="colours"):
        run(bundle_copy, PROMPT, Request(weights={"colours": 1.0}))


@pytest.mark.parametrize("part", ["index", "decoder data", "adapter"])
def test_a_damaged_bundle_is_not_changed(bundle_copy: Path, part: str, new_task: tuple[Path, Path]) -> None:
    name = USED[part](bundle_copy)
    size = (bundle_copy / name).stat().st_size
    (bundle_copy / name).write_bytes(bytes(size + 1))
    with pytest.raises(FileDamaged, match=name):
        add_task(bundle_copy, "travel", *new_task)
    with pytest.raises(FileDamaged, match=name):
        remove_task(bundle_copy, "animals")
