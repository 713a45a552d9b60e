"""GGUF adapters: names, orders and scales of llama.cpp; damaged files and what cannot be composed are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("gguf", reason="a package of edgecompose-export")

import gguf

from edgecompose import Request, open_bundle
from edgecompose.adapters import convert_adapter
from edgecompose.errors import AdapterError, EdgeComposeError, SlotMismatch, UnsupportedAdapter
from edgecompose.formats.architectures import ARCHITECTURES, Architecture
from edgecompose.formats.gguf import halved, interleaved, write_gguf_lora
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from tests.fixtures_tiny import TinyZoo
from tests.lora_files import (
    BASE,
    FIELDS,
    Tensors,
    as_it_is,
    exported,
    gguf_tensors,
    poison,
    refused,
    same_arrays,
    slots_of_llama,
    updates,
    with_tensor,
    without,
    write_gguf,
)

QUERY = "blk.0.attn_q.weight.lora_b"


@pytest.mark.parametrize("row", [row for row in ARCHITECTURES.values() if row.gguf], ids=lambda row: row.name)
def test_names_are_those_of_the_package_gguf(row: Architecture) -> None:
    names = gguf.get_tensor_name_map(next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == row.gguf), 1)
    assert row.paths.keys() == row.gguf_paths.keys()
    for module, name in row.gguf_paths.items():
        assert names.get_name(row.path(0, module)) == f"blk.0.{name}"


def test_rows_go_back_to_halves() -> None:
    rows = np.random.default_rng(0).standard_normal((48, 3)).astype(np.float32)
    assert np.array_equal(halved(interleaved(rows, 3), 3), rows)


def test_a_blend_that_was_written_is_read_back(bundle: Path, tmp_path: Path) -> None:
    with open_bundle(bundle, device="cpu") as composer:
        base = composer.bundle.manifest.base
        merged = composer.compose("x", Request(weights={"animals": 0.5, "numbers": -0.75})).merged
        write_gguf_lora(merged, tmp_path / "blend.gguf", base)
        expected = {name: a.swapaxes(1, 2) @ b for name, (a, b) in merged.factors().items()}
    result = updates(exported(tmp_path / "blend.gguf", tmp_path / "x.safetensors", base, 16))
    assert set(result) == set(expected)
    for name, update in expected.items():
        assert np.abs(result[name] - update).max() <= 2e-3 * np.abs(update).max(), name


def test_a_blend_for_a_packed_model_is_read_back(zoo: TinyZoo, merger: Merger, tmp_path: Path) -> None:
    base = dataclasses.replace(BASE, architecture="phi3")
    whole = exported(zoo.lora("packed all", "phi3"), tmp_path / "whole", base)
    few = exported(zoo.lora("packed few", "phi3", target_modules=["qkv_proj"], r=2), tmp_path / "few", base)
    merged = merger.merge([whole, dataclasses.replace(few, name="few")], [0.75, -0.5], MergeSettings())
    read = gguf.GGUFReader(write_gguf_lora(merged, tmp_path / "blend.gguf", base))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, 2)
    known = {
        names.get_name(f"model.layers.0.{path}")
        for path in (
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        )
    }
    written = {t.name for t in read.tensors if t.name.startswith("blk.0.")}
    assert written == {f"{name}.weight.lora_{side}" for name in known for side in "ab"}
    result = updates(exported(tmp_path / "blend.gguf", tmp_path / "back", base, 16))
    for name, (a, b) in merged.factors().items():
        update = a.swapaxes(1, 2) @ b
        assert np.abs(result[name] - update).max() <= 2e-3 * np.abs(update).max(), name


@pytest.mark.parametrize(("form", "tolerance"), [("F16", 2e-3), ("BF16", 1e-2), ("Q8_0", 2e-2)])
def test_other_numbers_are_read(zoo: TinyZoo, tmp_path: Path, form: str, tolerance: float) -> None:
    peft = zoo.lora("wide", r=32, lora_alpha=64)
    source = write_gguf(tmp_path / "x.gguf", gguf_tensors(peft), FIELDS | {"adapter.lora.alpha": 64.0}, form)
    expected, result = (
        updates(exported(path, tmp_path / f"{path.stem}.safetensors", bits=16)) for path in (peft, source)
    )
    for name, update in expected.items():
        assert 0 < np.abs(result[name] - update).max() <= tolerance * np.abs(update).max(), name


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 2.0), (-3.0, -0.75), (0.0, 1.0), (None, 1.0)])
def test_scales_are_those_of_llama_cpp(zoo: TinyZoo, tmp_path: Path, alpha: float | None, scale: float) -> None:
    fields: dict[str, Any] = {k: v for k, v in FIELDS.items() if k != "adapter.lora.alpha"}
    if alpha is not None:
        fields["adapter.lora.alpha"] = alpha
    adapter = exported(write_gguf(tmp_path / "x.gguf", gguf_tensors(zoo.lora("one")), fields), tmp_path / "x")
    assert all((m.scaling == np.float32(scale)).all() for m in adapter.modules.values())


def test_files_of_a_mistral_are_called_llama(zoo: TinyZoo, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "x.gguf", gguf_tensors(zoo.lora("one")))
    bases = (BASE, dataclasses.replace(BASE, architecture="mistral"))
    assert same_arrays(*(exported(source, tmp_path / str(base.architecture), base) for base in bases))
    hybrid = dataclasses.replace(BASE, architecture="granitemoehybrid")
    refused(source, hybrid, tmp_path, SlotMismatch, r"llama, this base is granitemoehybrid \(has none in GGUF files\)")


def test_files_of_the_other_byte_order_are_refused(zoo: TinyZoo, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "x.gguf", gguf_tensors(zoo.lora("one")))
    content = source.read_bytes()
    source.write_bytes(content[:4] + content[4:8][::-1] + content[8:])
    refused(source, BASE, tmp_path, UnsupportedAdapter, "the other byte order; convert it on this kind of machine")


def test_a_base_of_unknown_architecture_takes_the_files(zoo: TinyZoo, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "x.gguf", gguf_tensors(zoo.lora("one")))
    made = [exported(source, tmp_path / str(i), base) for i, base in enumerate((BASE, slots_of_llama()))]
    assert same_arrays(*made)


GGUF_REFUSED: dict[str, tuple[dict[str, Any], Callable[[Tensors], None], type[EdgeComposeError], str]] = {
    "a model": ({"general.type": "model"}, as_it_is, UnsupportedAdapter, "general.type 'model', expected 'adapter'"),
    "a control vector": ({"adapter.type": "control"}, as_it_is, UnsupportedAdapter, "adapter.type 'control'"),
    "aLoRA": ({"adapter.alora.invocation_tokens": [1, 2]}, as_it_is, UnsupportedAdapter, r"aLoRA \(adapter\.al"),
    "other architecture": ({"general.architecture": "qwen2"}, as_it_is, SlotMismatch, "qwen2, this base is llama"),
    "strange architecture": ({"general.architecture": "rwkv7"}, as_it_is, UnsupportedAdapter, "'rwkv7'; llama, qwen2"),
    "NaN alpha": ({"adapter.lora.alpha": float("nan")}, as_it_is, AdapterError, "nan is no usable adapter.lora.alpha"),
    "text alpha": ({"adapter.lora.alpha": "8"}, as_it_is, AdapterError, "'8' is no usable adapter.lora.alpha"),
    "embedding": (
        {},
        with_tensor("token_embd.weight.lora_a", np.ones((4, 4), np.float32)),
        UnsupportedAdapter,
        r"token_embd\.weight\.lora_a; it was trained with new tokens",
    ),
    "output": (
        {},
        with_tensor("output.weight.lora_a", np.ones((4, 4), np.float32)),
        UnsupportedAdapter,
        r"output\.weight\.lora_a; it was trained with new tokens",
    ),
    "norm": ({}, with_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32)), UnsupportedAdapter, "attn_norm"),
    "experts": (
        {},
        with_tensor("blk.0.ffn_up_exps.weight.lora_a", np.ones((2, 4), np.float32)),
        UnsupportedAdapter,
        "exps",
    ),
    "NaN": ({}, poison(QUERY), AdapterError, "not finite"),
    "alone": ({}, without(QUERY), AdapterError, "'blk.0.attn_q' has lora_A alone"),
    "other shape": ({}, with_tensor(QUERY, np.ones((32, 4), np.float32)), SlotMismatch, "64x32 in the adapter"),
    "part of a head": (
        {},
        with_tensor(QUERY, np.ones((70, 4), np.float32)),
        SlotMismatch,
        "no whole number of heads of 16",
    ),
    "other rank": ({}, with_tensor(QUERY, np.ones((64, 3), np.float32)), AdapterError, "factors of shapes"),
    "another layer": (
        {},
        with_tensor("blk.7.attn_q.weight.lora_a", np.ones((4, 64), np.float32)),
        AdapterError,
        "alone",
    ),
    "nothing": ({}, lambda tensors: tensors.clear(), AdapterError, "no LoRA factor"),
}


@pytest.mark.parametrize("case", GGUF_REFUSED)
def test_gguf_files_that_cannot_be_composed(zoo: TinyZoo, tmp_path: Path, case: str) -> None:
    fields, change, error, message = GGUF_REFUSED[case]
    tensors: Tensors = dict(gguf_tensors(zoo.lora("one")))
    change(tensors)
    refused(write_gguf(tmp_path / "x.gguf", tensors, FIELDS | fields), BASE, tmp_path, error, message)


def test_numbers_of_another_type_are_refused(zoo: TinyZoo, tmp_path: Path) -> None:
    tensors = gguf_tensors(zoo.lora("wide", r=32, lora_alpha=64))
    refused(write_gguf(tmp_path / "x.gguf", tensors, form="Q4_0"), BASE, tmp_path, UnsupportedAdapter, "type Q4_0")


def test_damaged_gguf_files(zoo: TinyZoo, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(zoo.lora("one")))
    whole = path.read_bytes()
    for end in (4, 6, 20, 30, 100, 500, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:end])
        with pytest.raises(AdapterError, match="cannot be read as GGUF"):
            convert_adapter(path, BASE, tmp_path / "a")
    endless = bytearray(whole)
    endless[16:24] = b"\xff" * 8  # so many fields
    path.write_bytes(endless)
    refused(path, BASE, tmp_path, AdapterError, "cannot be read as GGUF")
    path.write_bytes(b"GGUX" + whole[4:])
    refused(path, BASE, tmp_path, AdapterError, "begins with b'GGUX', not with b'GGUF'")
    path.write_bytes(b"")
    refused(path, BASE, tmp_path, AdapterError, "begins with b''")
    other = tmp_path / "x.bin"
    other.write_bytes(b"GGML" + whole[4:])
    refused(other, BASE, tmp_path, AdapterError, "is a file of no known format; give")
    other.write_bytes(whole)  # what is in it counts, not what it is called
    assert exported(other, tmp_path / "b").rank == 4


def test_a_file_that_names_endless_arrays_ends(tmp_path: Path) -> None:
    key = b"a"
    array = (9).to_bytes(4, "little") + (4).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
    header = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    path = tmp_path / "x.gguf"
    path.write_bytes(header + len(key).to_bytes(8, "little") + key + array + bytes(64))
    refused(path, BASE, tmp_path, AdapterError, "the file ends at byte 113")
