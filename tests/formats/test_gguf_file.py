"""A GGUF file holds what the package gguf wrote into it; one with any bytes changed is read or refused."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="a package of edgecompose-export")

from edgecompose.errors import ExportError
from edgecompose.formats.gguf_file import is_later_shard, read_gguf, read_shards

KINDS = [kind for kind in GGMLQuantizationType if kind.name not in ("F32", "F16")]
VALUES = st.one_of(
    st.text(max_size=20),
    st.booleans(),
    st.integers(-(2**31), 2**31 - 1),
    st.floats(width=32, allow_nan=False),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
    st.lists(st.text(max_size=5), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
SHAPES = st.lists(st.integers(1, 4), max_size=2)


@st.composite
def contents(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, tuple[str, Any]], int]:
    """Metadata; types and values of tensors; alignment."""
    metadata = draw(st.dictionaries(NAMES.map(lambda name: f"x.{name}"), VALUES, max_size=6))
    tensors: dict[str, tuple[str, Any]] = {}
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        rows = tuple(draw(SHAPES))
        kind = draw(st.sampled_from(["F32", "F16", *(kind.name for kind in KINDS)]))
        if kind in ("F32", "F16"):
            values: Any = rng.normal(size=(*rows, 5)).astype(np.float32 if kind == "F32" else np.float16)
        else:
            size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
            values = rng.integers(0, 256, (*rows, 2 * size), np.uint8)
        tensors[name] = (kind, values)
    return metadata, tensors, draw(st.sampled_from([8, 32, 64, 256]))


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[str, Any]], alignment: int) -> Path:
    writer = gguf.GGUFWriter(path, "test")
    writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, (kind, values) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType[kind] if values.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@given(content=contents())
def test_what_was_written_is_read(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    metadata, tensors, alignment = content
    path = write(tmp_path_factory.mktemp("gguf") / "x.gguf", metadata, tensors, alignment)
    file = read_gguf(path)
    assert file.metadata == {"general.architecture": "test", "general.alignment": alignment, **metadata}
    assert set(file.tensors) == set(tensors)
    for name, (kind, values) in tensors.items():
        tensor = file.tensors[name]
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        width = values.shape[-1] if values.dtype != np.uint8 else values.shape[-1] // size * block
        assert (tensor.type, tensor.shape) == (kind, (*values.shape[:-1], width))
        assert tensor.offset % alignment == 0
        assert file.data(name).shape == (int(np.prod(values.shape[:-1])), values.shape[-1] * values.itemsize)
        assert file.data(name).tobytes() == values.tobytes()
    assert read_shards(path)[0].metadata == file.metadata


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of each kind of metadata."""
    metadata = {"x.a": "text", "x.b": 3, "x.c": 0.5, "x.d": [1, 2, 3], "x.e": ["a", "bc"], "x.f": True}
    tensors = {"one": ("F32", np.ones((2, 5), np.float32)), "two": ("Q8_0", np.zeros((3, 34), np.uint8))}
    return write(tmp_path_factory.mktemp("gguf") / "x.gguf", metadata, tensors, 32).read_bytes()


NUMBERS = st.one_of(
    st.integers(0, 255).map(lambda n: bytes([n])),
    st.binary(min_size=1, max_size=9),
    st.sampled_from([0, 1, 2**31, 2**32 - 1]).map(lambda n: struct.pack("<I", n)),
    st.sampled_from([0, 2**22, 2**31, 2**48, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n)),
)


@given(data=st.data())
@settings(max_examples=500)
def test_any_bytes_changed_are_read_or_refused(
    data: st.DataObject, sample: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 2))):
        at, new = data.draw(st.integers(0, len(sample) - 1)), data.draw(NUMBERS)
        content[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content)
    with contextlib.suppress(ExportError):
        file = read_gguf(path)
        for name, tensor in file.tensors.items():
            assert file.data(name).size == tensor.bytes
            assert tensor.offset + tensor.bytes <= len(content)
    path.unlink()


@pytest.mark.parametrize("value", [0, 1, 99, 255])
def test_any_one_byte_changed_is_read_or_refused(value: int, sample: bytes, tmp_path: Path) -> None:
    refused = 0
    for at in range(len(sample)):
        path = tmp_path / f"{at}.gguf"
        path.write_bytes(sample[:at] + bytes([value]) + sample[at + 1 :])
        try:
            read_gguf(path)
        except ExportError as error:
            assert f"{at}.gguf" in str(error)
            refused += 1
        path.unlink()
    assert refused > 20


def test_a_file_cut_anywhere_is_refused(sample: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    last = read_gguf(write(path, {}, {"one": ("F32", np.ones(5, np.float32))}, 32)).tensors["one"]
    whole = path.read_bytes()
    for size in range(last.offset + last.bytes):
        path.write_bytes(whole[:size])
        with pytest.raises(ExportError, match=r"x\.gguf"):
            read_gguf(path)


@pytest.mark.parametrize(
    ("name", "later"),
    [("x-00001-of-00003.gguf", False), ("x-00002-of-00003.gguf", True), ("x.gguf", False), ("x-2-of-3.gguf", False)],
)
def test_a_later_shard_is_known_by_its_name(name: str, later: bool) -> None:
    assert is_later_shard(Path(name)) == later
