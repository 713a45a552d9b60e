"""Damaged, foreign and unfinished bases: each is refused in one line that names it, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

import torch

from edgecompose.errors import ExportError
from edgecompose.formats.checkpoint import read_shard
from edgecompose.formats.gguf_file import read_gguf
from edgecompose_export.base.export import export_base
from edgecompose_export.base.source import open_base
from edgecompose_export.graphs.writer import DataFile
from tests import tiny
from tests.export.hostile import MOST_MEMORY, MOST_TIME, refusal
from tests.fixtures_tiny import TinyZoo
from tests.gguf_models import MODELS, quantized, write_gguf

pytestmark = pytest.mark.slow


def peak_memory() -> int:
    """Most bytes that the process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    return write_gguf(root / "whole.gguf", MODELS["llama-3.2"].write(root / "model", num_hidden_layers=1))


@pytest.fixture
def folder(zoo: TinyZoo, tmp_path: Path) -> Path:
    """A Hugging Face folder, to be damaged."""
    return shutil.copytree(zoo.model("llama"), tmp_path / "llama")


def data_start(file: Path) -> int:
    return min(tensor.offset for tensor in read_gguf(file).tensors.values())


def key_spans(content: bytes) -> list[tuple[int, int]]:
    """Where each number of the metadata that is no list stands, and how many bytes it has."""
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    keys, position, spans = struct.unpack_from("<Q", content, 16)[0], 24, []

    def skipped(kind: int, at: int) -> int:
        if kind == 8:
            return at + 8 + int(struct.unpack_from("<Q", content, at)[0])
        if kind != 9:
            return at + widths[kind]
        inner, count = struct.unpack_from("<IQ", content, at)
        at += 12
        for _ in range(count):
            at = skipped(inner, at)
        return at

    for _ in range(keys):
        position = skipped(8, position)
        (kind,) = struct.unpack_from("<I", content, position)
        position += 4
        if kind in widths:
            spans.append((position, widths[kind]))
        position = skipped(kind, position)
    return spans


def test_a_file_that_is_cut_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    content, start = file.read_bytes(), data_start(file)
    table = content.index(b"output_norm.weight") - 8
    places = [*range(10), 15, 16, 23, 24, 31, 32]  # magic, version, counts
    places += [int(place) for place in np.linspace(33, table, 10)]  # metadata
    places += [int(place) for place in np.linspace(table + 1, start - 1, 7)]  # tensors described
    places += [int(place) for place in np.linspace(start, len(content) - 1, 7)]  # data
    assert len(set(places)) == 40
    path = tmp_path / "cut.gguf"
    for place in places:
        path.write_bytes(content[:place])
        refusal(path)
    path.write_bytes(content)
    open_base(path)


def is_handled(path: Path) -> bool:
    """Whether a file is a base; what is none is refused, and neither takes long or much memory."""
    started = time.monotonic()
    try:
        open_base(path)
    except ExportError as error:
        assert "\n" not in str(error)
        assert path.name in str(error)
        return False
    else:
        return True
    finally:
        assert time.monotonic() - started < MOST_TIME


def test_damaged_headers_are_refused_or_harmless(file: Path, tmp_path: Path) -> None:
    content, start, draw = file.read_bytes(), data_start(file), random.Random(20)
    path, outcomes = tmp_path / "damaged.gguf", []
    before = peak_memory()
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at, size = draw.randrange(4, start), draw.choice((1, 1, 4, 8))
            bit = (1 << draw.randrange(8 * size)).to_bytes(size, "little")
            damaged[at : at + size] = draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size), bit))
        path.write_bytes(damaged)
        outcomes.append(is_handled(path))
    assert peak_memory() - before < MOST_MEMORY
    assert 20 < sum(outcomes) < 280


@pytest.mark.parametrize("value", ["zero", "one", "negative", "large", "no number"])
def test_any_number_of_the_metadata_may_be_another(value: str, file: Path, tmp_path: Path) -> None:
    content, path = file.read_bytes(), tmp_path / "damaged.gguf"
    before = peak_memory()
    for at, size in key_spans(content):
        raw = {
            "zero": bytes(size),
            "one": (1).to_bytes(size, "little"),
            "negative": b"\xff" * size,
            "large": bytes(size - 1) + b"\x40",
            "no number": (b"\0\0\xc0\x7f" * 2)[:size],
        }[value]
        path.write_bytes(content[:at] + raw + content[at + size :])
        is_handled(path)
    assert peak_memory() - before < MOST_MEMORY


@pytest.mark.parametrize("kind", [0, 7, 8, 9])
def test_a_list_as_long_as_a_large_file_is_refused(kind: int, tmp_path: Path) -> None:
    """The file has the bytes that its list claims, as a hole."""
    path, count = tmp_path / "large.gguf", 1 << 30
    with path.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, kind, count))
        stream.truncate(8 * count)
    before = peak_memory()
    assert not is_handled(path)
    assert peak_memory() - before < MOST_MEMORY


def test_keys_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    with path.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40))
        stream.truncate(1 << 33)
    assert not is_handled(path)


INSTEAD: Mapping[str, bytes] = {
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
    "page": b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body></body></html>\n",
    "empty": b"",
    "short": b"G",
    "text": b"Entry not found",
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("kind", INSTEAD)
def test_what_is_no_gguf_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(INSTEAD[kind])
    refusal(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("kind", INSTEAD)
def test_what_is_no_file_of_a_folder_is_refused(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).write_bytes(INSTEAD[kind])
    assert name in refusal(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_a_scale_that_is_no_number_is_refused(kind: str, value: float, tmp_path: Path) -> None:
    raw = quantized(np.zeros((256, 256), np.float32), kind)
    raw[3, :2] = np.array([value], "<f2").view(np.uint8)
    path = write_gguf(
        tmp_path / "model.gguf",
        MODELS["llama"].write(tmp_path / "model", **WIDE),
        extra={"blk.0.ffn_up.weight": raw},
        extra_type=GGMLQuantizationType[kind],
    )
    assert "blk.0.ffn_up.weight" in refusal(path, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "model.gguf"]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_weight_that_is_no_number_is_refused(tensor: str, value: float, folder: Path, tmp_path: Path) -> None:
    shard = read_shard(folder / "model.safetensors")
    place = next(stored for stored in shard.tensors if stored.name == tensor)
    with shard.path.open("r+b") as stream:
        stream.seek(shard.data + place.start + 8)
        stream.write(np.array([value], "<f4").tobytes())
    assert tensor in refusal(folder, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["llama"]


def test_weights_that_are_cut_anywhere_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for place in (*range(0, 12, 3), 100, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place])
        assert "model.safetensors" in refusal(folder)


def sharded(folder: Path, names: Mapping[str, str]) -> Path:
    """The folder with its weights as a shard, and an index that names others too."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    tiny.write_json(folder / "model.safetensors.index.json", {"weight_map": dict(names)})
    return folder


def test_a_shard_of_the_index_that_is_missing_is_named(folder: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    assert "model-00002-of-00002.safetensors" in refusal(sharded(folder, names))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}', "[" * 50000])
def test_a_damaged_index_is_refused(text: str, folder: Path) -> None:
    sharded(folder, {"a": "model-00001-of-00002.safetensors"})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    assert "model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize("value", [[1, 2], {"state_dict": {"a": 1}}, 3])
def test_a_torch_file_that_holds_no_tensors_by_name_is_refused(value: object, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")
    assert "convert them to safetensors" in refusal(folder)


@pytest.mark.parametrize(("dtype", "width"), [("F8_E4M3", 1), ("I32", 4), ("U8", 1), ("BOOL", 1)])
def test_types_that_are_no_floats_are_refused(dtype: str, width: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, end = json.loads(content[8 : 8 + size]), 0
    for name, tensor in header.items():
        if name != "__metadata__":
            count = int(np.prod(tensor["shape"]))
            tensor["dtype"] = dtype if name == "lm_head.weight" else "F32"
            end, start = end + count * (width if name == "lm_head.weight" else 4), end
            tensor["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    assert f"lm_head.weight ({dtype})" in refusal(folder)


def full_disk(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the third write of weights fail."""
    write, calls = DataFile.write, iter(range(1 << 20))

    def failing(self: DataFile, name: str, values: Any, position: int = 0) -> int:
        if next(calls) == 2:
            raise error
        return write(self, name, values, position)

    monkeypatch.setattr(DataFile, "write", failing)


def test_a_full_disk_is_reported_and_leaves_nothing(
    zoo: TinyZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        full_disk(patch, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(ExportError, match=r"out' cannot be written: No space left on device; make room"):
            export_base(zoo.model("llama"), output, "fp32")
    assert list(tmp_path.iterdir()) == []
    export_base(zoo.model("llama"), output, "fp32")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        export_base(file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def as_a_file(output: Path) -> None:
    output.parent.write_text("a file", encoding="utf-8")


def under_a_file(output: Path) -> None:
    output.parent.parent.write_text("a file", encoding="utf-8")


@pytest.mark.parametrize("make", [as_a_file, under_a_file])
def test_an_output_below_a_file_is_refused(make: Callable[[Path], None], file: Path, tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out" if make is under_a_file else tmp_path / "a" / "out"
    make(output)
    with pytest.raises(ExportError, match=r"out' cannot be written: .*; make room, or give another folder"):
        export_base(file, output)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_an_output_with_too_long_a_name_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot be written: File name too long"):
        export_base(file, tmp_path / ("a" * 300))
    assert list(tmp_path.iterdir()) == []
