"""Adapters of PEFT, mlx_lm and llama.cpp with the same factors become the same file; others are refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("gguf", reason="a package of edgecompose-export")

import gguf
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from edgecompose import Request, open_bundle
from edgecompose.bundle.adapter import Adapter, adapter_metadata, load_adapter
from edgecompose.bundle.quantization import dequantize
from edgecompose.bundle.specs import BaseSpec
from edgecompose.errors import AdapterError, EdgeComposeError, SlotMismatch, UnsupportedAdapter
from edgecompose.formats.architectures import ARCHITECTURES, Architecture
from edgecompose.formats.gguf import halved, interleaved, write_gguf_lora
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from edgecompose_export.adapters import export_adapter, source_kind
from edgecompose_export.bundles import add_task
from edgecompose_export.cli import main
from tests import tiny
from tests.fixtures_tiny import TASKS, TinyZoo
from tests.formats.test_adapters_export import slots_of_llama

Float = npt.NDArray[np.float32]
Tensors = dict[str, Any]
BASE = dataclasses.replace(slots_of_llama(), architecture="llama")
MLX_CONFIG = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
FIELDS = {
    "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 8.0,
}  # fmt: skip
QUERY = "blk.0.attn_q.weight.lora_b"


def mlx_tensors(peft: Path) -> Tensors:
    """The factors of a PEFT folder as mlx_lm keeps them: turned, under its names."""
    renamed = {}
    for key, values in load_file(peft / "adapter_model.safetensors").items():
        path = key.removeprefix("base_model.model.").removesuffix(".weight")
        renamed[path.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = values.T.contiguous()
    return renamed


def write_mlx(folder: Path, tensors: Tensors, config: Any = MLX_CONFIG) -> Path:
    folder.mkdir()
    tiny.write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def gguf_tensors(peft: Path, architecture: str = "llama", head_size: int = BASE.head_size) -> dict[str, Float]:
    """The factors of a PEFT folder as llama.cpp's converter names and orders them."""
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), 8
    )
    renamed = {}
    for key, values in load_file(peft / "adapter_model.safetensors").items():
        path, side = key.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        rows = values.numpy()
        if architecture in ("llama", "granite", "smollm3") and side == "B" and path.endswith(("q_proj", "k_proj")):
            rows = interleaved(rows, len(rows) // head_size)
        renamed[f"{names.get_name(path)}.weight.lora_{side.lower()}"] = np.ascontiguousarray(rows)
    return renamed


def write_gguf(path: Path, tensors: Mapping[str, Float], fields: Mapping[str, Any] = FIELDS, form: str = "F32") -> Path:
    writer = gguf.GGUFWriter(path, str(fields.get("general.architecture", "llama")))
    for key, value in fields.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_float32(key, value)
    kind = gguf.GGMLQuantizationType[form]
    for name, values in tensors.items():
        if form in ("F32", "F16"):
            writer.add_tensor(name, values.astype(np.float32 if form == "F32" else np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def exported(source: Path, output: Path, base: BaseSpec = BASE, bits: Any = 8) -> Adapter:
    export_adapter(source, base, output, bits)
    return load_adapter(output, "x", base.slots, base.identity)


def same_arrays(one: Adapter, other: Adapter) -> bool:
    assert set(one.modules) == set(other.modules)
    return all(
        np.array_equal(getattr(getattr(one.modules[m], side), part), getattr(getattr(other.modules[m], side), part))
        and np.array_equal(one.modules[m].scaling, other.modules[m].scaling)
        for m in one.modules for side in "ab" for part in ("codes", "scales")
    )  # fmt: skip


def updates(adapter: Adapter) -> dict[str, Float]:
    """ΔW (L, in, out) of every module."""
    return {
        name: (m.scaling[:, None, None] * dequantize(m.a).swapaxes(1, 2) @ dequantize(m.b)).astype(np.float32)
        for name, m in adapter.modules.items()
    }


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_same_factors_in_three_formats_give_the_same_arrays(zoo: TinyZoo, tmp_path: Path, bits: Any) -> None:
    peft = zoo.lora("one")
    sources = {
        "peft": peft,
        "mlx": write_mlx(tmp_path / "one-mlx", mlx_tensors(peft)),
        "gguf": write_gguf(tmp_path / "one.gguf", gguf_tensors(peft)),
    }
    made = {}
    for kind, source in sources.items():
        assert source_kind(source) == kind
        output = tmp_path / f"{kind}.safetensors"
        made[kind] = exported(source, output, bits=bits)
        about = json.loads(adapter_metadata(output)["source"])
        assert about.get("kind", "peft") == kind
        assert about["name"] == source.stem and len(about["weights_sha256"]) == 64
    assert same_arrays(made["peft"], made["mlx"])
    assert same_arrays(made["peft"], made["gguf"])


@pytest.mark.parametrize("kind", ["mlx", "gguf"])
def test_packed_projections_are_split(zoo: TinyZoo, tmp_path: Path, kind: str) -> None:
    peft, base = zoo.lora("packed all", "phi3"), dataclasses.replace(BASE, architecture="phi3")
    if kind == "mlx":
        source = write_mlx(tmp_path / "mlx", mlx_tensors(peft))
    else:
        source = write_gguf(tmp_path / "x.gguf", gguf_tensors(peft, "phi3"), FIELDS | {"general.architecture": "phi3"})
    made = [exported(path, tmp_path / f"{i}.safetensors", base) for i, path in enumerate((peft, source))]
    assert len(made[0].modules) == 7
    assert same_arrays(*made)


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
        wanted = {name: a.swapaxes(1, 2) @ b for name, (a, b) in merged.factors().items()}
    found = updates(exported(tmp_path / "blend.gguf", tmp_path / "x.safetensors", base, 16))
    assert set(found) == set(wanted)
    for name, update in wanted.items():
        assert np.abs(found[name] - update).max() <= 2e-3 * np.abs(update).max(), name


def test_a_blend_for_a_packed_model_is_read_back(zoo: TinyZoo, merger: Merger, tmp_path: Path) -> None:
    base = dataclasses.replace(BASE, architecture="phi3")
    whole = exported(zoo.lora("packed all", "phi3"), tmp_path / "whole", base)
    few = exported(zoo.lora("packed few", "phi3", target_modules=["qkv_proj"], r=2), tmp_path / "few", base)
    merged = merger.merge([whole, dataclasses.replace(few, name="few")], [0.75, -0.5], MergeSettings())
    read = gguf.GGUFReader(write_gguf_lora(merged, tmp_path / "blend.gguf", base))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, 2)
    known = {names.get_name(f"model.layers.0.{path}") for path in (
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj",
    )}  # fmt: skip
    written = {t.name for t in read.tensors if t.name.startswith("blk.0.")}
    assert written == {f"{name}.weight.lora_{side}" for name in known for side in "ab"}
    found = updates(exported(tmp_path / "blend.gguf", tmp_path / "back", base, 16))
    for name, (a, b) in merged.factors().items():
        update = a.swapaxes(1, 2) @ b
        assert np.abs(found[name] - update).max() <= 2e-3 * np.abs(update).max(), name


@pytest.mark.parametrize(("form", "tolerance"), [("F16", 2e-3), ("BF16", 1e-2), ("Q8_0", 2e-2)])
def test_other_numbers_are_read(zoo: TinyZoo, tmp_path: Path, form: str, tolerance: float) -> None:
    peft = zoo.lora("wide", r=32, lora_alpha=64)
    source = write_gguf(tmp_path / "x.gguf", gguf_tensors(peft), FIELDS | {"adapter.lora.alpha": 64.0}, form)
    wanted, found = (updates(exported(path, tmp_path / f"{path.stem}.safetensors", bits=16)) for path in (peft, source))
    for name, update in wanted.items():
        assert 0 < np.abs(found[name] - update).max() <= tolerance * np.abs(update).max(), name


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


MLX_SCALES: dict[str, tuple[dict[str, Any], float | None]] = {
    "new": ({"num_layers": 16, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}, 20.0),
    "a whole number": ({"num_layers": 16, "lora_parameters": {"rank": 4, "scale": 3, "keys": ["x"]}}, 3.0),
    "new, alpha ignored": ({"num_layers": 16, "lora_parameters": {"rank": 4, "scale": 5.0, "alpha": 16}}, 5.0),
    "old without alpha": ({"lora_layers": 16, "lora_parameters": {"rank": 4, "scale": 5.0}}, 5.0),
    "old, alpha of no effect": ({"lora_layers": 16, "lora_parameters": {"rank": 4, "scale": 5.0, "alpha": 4}}, 5.0),
    "old with alpha": ({"lora_layers": 16, "lora_parameters": {"rank": 4, "scale": 5.0, "alpha": 16}}, None),
}


@pytest.mark.parametrize("case", MLX_SCALES)
def test_scales_are_those_of_mlx(zoo: TinyZoo, tmp_path: Path, case: str) -> None:
    config, scale = MLX_SCALES[case]
    folder = write_mlx(tmp_path / "mlx", mlx_tensors(zoo.lora("one")), config)
    if scale is None:
        with pytest.raises(UnsupportedAdapter, match=r"scale 5\.0 and alpha 16.*put what was meant into scale"):
            export_adapter(folder, BASE, tmp_path / "x")
    else:
        adapter = exported(folder, tmp_path / "x")
        assert all((m.scaling == np.float32(scale)).all() for m in adapter.modules.values())


def test_a_prefix_and_few_layers_are_read(zoo: TinyZoo, tmp_path: Path) -> None:
    tensors = {f"language_model.{k}": v for k, v in mlx_tensors(zoo.lora("one")).items() if ".1." in k}
    adapter = exported(write_mlx(tmp_path / "mlx", tensors), tmp_path / "x")
    assert all(m.ranks.tolist() == [0, 4] for m in adapter.modules.values())


# Refused


def _as_it_is(tensors: Tensors) -> None:
    """Change nothing: the settings are at fault."""


def _without(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(key)


def _with(key: str, value: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: value})


def _poison(key: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[key] = tensors[key] + float("nan")

    return change


_MLX_QUERY = "model.layers.0.self_attn.q_proj"
_PARAMETERS: dict[str, Any] = {"rank": 4, "scale": 2.0}
MLX_REFUSED: dict[str, tuple[dict[str, Any], Callable[[Tensors], None], type[EdgeComposeError], str]] = {
    "dora": ({"fine_tune_type": "dora"}, _as_it_is, UnsupportedAdapter, "fine_tune_type 'dora'"),
    "full": ({"fine_tune_type": "full"}, _as_it_is, UnsupportedAdapter, "fine_tune_type 'full'"),
    "old dora": ({"fine_tune_type": None, "use_dora": True}, _as_it_is, UnsupportedAdapter, "'dora'"),
    "magnitude": ({}, _with(f"{_MLX_QUERY}.m", torch.ones(64)), UnsupportedAdapter, r"q_proj\.m', a magnitude of DoRA"),
    "experts": ({}, _with("model.layers.0.mlp.switch_mlp.up_proj.lora_a", torch.ones(2, 4, 64)), UnsupportedAdapter,
                "fused experts"),
    "embedding": ({}, _with("model.embed_tokens.lora_a", torch.ones(300, 4)), UnsupportedAdapter,
                  r"embed_tokens\.lora_a; it was trained with new tokens"),
    "output": ({}, _with("lm_head.lora_b", torch.ones(4, 300)), UnsupportedAdapter,
               r"lm_head\.lora_b; it was trained with new tokens"),
    "NaN": ({}, _poison(f"{_MLX_QUERY}.lora_b"), AdapterError, "not finite"),
    "alone": ({}, _without(f"{_MLX_QUERY}.lora_b"), AdapterError, r"0\.self_attn\.q_proj' has lora_A alone"),
    "other shape": ({}, _with(f"{_MLX_QUERY}.lora_b", torch.ones(4, 32)), SlotMismatch, "64x32 there"),
    "not turned": ({}, _with(f"{_MLX_QUERY}.lora_a", torch.ones(4, 64)), AdapterError, "factors of shapes"),
    "no scale": ({"lora_parameters": {"rank": 4}}, _as_it_is, AdapterError, "None is no usable scale.*; give a number"),
    "text": ({"lora_parameters": _PARAMETERS | {"scale": "2"}}, _as_it_is, AdapterError, "'2' is no usable scale"),
    "infinite": ({"lora_parameters": _PARAMETERS | {"scale": float("inf")}}, _as_it_is, AdapterError, "usable scale"),
    "no parameters": ({"lora_parameters": None}, _as_it_is, AdapterError, "has no lora_parameters"),
    "no rank": ({"lora_parameters": {"scale": 2.0}}, _as_it_is, AdapterError, "has rank None"),
    "other rank": ({"lora_parameters": _PARAMETERS | {"rank": 8}}, _as_it_is, AdapterError, "rank 4, .* says 8"),
    "nothing": ({}, lambda tensors: tensors.clear(), AdapterError, "no LoRA factor"),
}  # fmt: skip


def refused(source: Path, base: BaseSpec, tmp_path: Path, error: type[EdgeComposeError], message: str) -> None:
    """Refused here, and by the command with exit code 1 and one line."""
    output = tmp_path / "out" / "a.safetensors"
    with pytest.raises(error, match=message):
        export_adapter(source, base, output)
    tiny.write_json(tmp_path / "base" / "base.json", dataclasses.asdict(base))
    done = CliRunner().invoke(main, ["adapter", str(source), "--base", str(tmp_path / "base"), "-o", str(output)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.strip().splitlines()[-1].startswith("edgecompose-export: adapter ")
    assert not output.parent.exists()


@pytest.mark.parametrize("case", MLX_REFUSED)
def test_folders_of_mlx_that_cannot_be_composed(zoo: TinyZoo, tmp_path: Path, case: str) -> None:
    config, change, error, message = MLX_REFUSED[case]
    tensors = mlx_tensors(zoo.lora("one"))
    change(tensors)
    refused(write_mlx(tmp_path / "mlx", tensors, MLX_CONFIG | config), BASE, tmp_path, error, message)


def test_incomplete_folders_of_mlx(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = write_mlx(tmp_path / "mlx", mlx_tensors(zoo.lora("one")))
    whole = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(whole[:-1])
    refused(folder, BASE, tmp_path, AdapterError, r"adapters\.safetensors cannot be read")
    (folder / "adapters.safetensors").unlink()
    refused(folder, BASE, tmp_path, AdapterError, r"has no adapters\.safetensors")
    (folder / "adapter_config.json").unlink()
    refused(folder, BASE, tmp_path, AdapterError, r"no readable adapter_config\.json; give a PEFT")


GGUF_REFUSED: dict[str, tuple[dict[str, Any], Callable[[Tensors], None], type[EdgeComposeError], str]] = {
    "a model": ({"general.type": "model"}, _as_it_is, UnsupportedAdapter, "general.type 'model', expected 'adapter'"),
    "a control vector": ({"adapter.type": "control"}, _as_it_is, UnsupportedAdapter, "adapter.type 'control'"),
    "aLoRA": ({"adapter.alora.invocation_tokens": [1, 2]}, _as_it_is, UnsupportedAdapter, r"aLoRA \(adapter\.al"),
    "other architecture": ({"general.architecture": "qwen2"}, _as_it_is, SlotMismatch, "qwen2, this base is llama"),
    "strange architecture": ({"general.architecture": "rwkv7"}, _as_it_is, UnsupportedAdapter, "'rwkv7'; llama, qwen2"),
    "NaN alpha": ({"adapter.lora.alpha": float("nan")}, _as_it_is, AdapterError, "alpha is nan"),
    "text alpha": ({"adapter.lora.alpha": "8"}, _as_it_is, AdapterError, "alpha is '8'"),
    "embedding": ({}, _with("token_embd.weight.lora_a", np.ones((4, 4), np.float32)), UnsupportedAdapter,
                  r"token_embd\.weight\.lora_a; it was trained with new tokens"),
    "output": ({}, _with("output.weight.lora_a", np.ones((4, 4), np.float32)), UnsupportedAdapter,
               r"output\.weight\.lora_a; it was trained with new tokens"),
    "norm": ({}, _with("blk.0.attn_norm.weight", np.ones(64, np.float32)), UnsupportedAdapter, "attn_norm"),
    "experts": ({}, _with("blk.0.ffn_up_exps.weight.lora_a", np.ones((2, 4), np.float32)), UnsupportedAdapter, "exps"),
    "NaN": ({}, _poison(QUERY), AdapterError, "not finite"),
    "alone": ({}, _without(QUERY), AdapterError, "'blk.0.attn_q' has lora_A alone"),
    "other shape": ({}, _with(QUERY, np.ones((32, 4), np.float32)), SlotMismatch, "64x32 there"),
    "part of a head": ({}, _with(QUERY, np.ones((70, 4), np.float32)), SlotMismatch, "no whole number of heads of 16"),
    "other rank": ({}, _with(QUERY, np.ones((64, 3), np.float32)), AdapterError, "factors of shapes"),
    "another layer": ({}, _with("blk.7.attn_q.weight.lora_a", np.ones((4, 64), np.float32)), AdapterError, "alone"),
    "nothing": ({}, lambda tensors: tensors.clear(), AdapterError, "no LoRA factor"),
}  # fmt: skip


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
            export_adapter(path, BASE, tmp_path / "a")
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
    refused(other, BASE, tmp_path, AdapterError, "is a file, but no GGUF file")
    other.write_bytes(whole)  # what is in it counts, not what it is called
    assert exported(other, tmp_path / "b").rank == 4


def test_a_file_that_names_endless_arrays_ends(tmp_path: Path) -> None:
    key = b"a"
    array = (9).to_bytes(4, "little") + (4).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
    header = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    path = tmp_path / "x.gguf"
    path.write_bytes(header + len(key).to_bytes(8, "little") + key + array + bytes(64))
    refused(path, BASE, tmp_path, AdapterError, "the file ends at byte 113")


@pytest.mark.parametrize("kind", ["mlx", "gguf"])
def test_a_task_takes_an_adapter_of_any_kind(zoo: TinyZoo, bundle_copy: Path, tmp_path: Path, kind: str) -> None:
    peft = zoo.lora("one")
    if kind == "mlx":
        source = write_mlx(tmp_path / "mlx", mlx_tensors(peft))
    else:
        source = write_gguf(tmp_path / "x.gguf", gguf_tensors(peft))
    manifest = add_task(bundle_copy, "travel", source, tiny.write_task(tmp_path / "t.jsonl", TASKS["animals"]))
    assert manifest.adapters["travel"].source["kind"] == kind
    with open_bundle(bundle_copy, device="cpu") as composer:
        assert composer.run("x", Request(weights={"travel": 1.0}, max_tokens=1)).text is not None


def test_peft_is_taken_where_both_lie(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo.lora("one"), tmp_path / "both")
    save_file(mlx_tensors(folder), folder / "adapters.safetensors")
    assert source_kind(folder) == "peft"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tiny.write_json(folder / "adapter_config.json", config | MLX_CONFIG)
    assert source_kind(folder) == "peft"


def test_weights_decide_where_a_config_has_the_settings_of_both(zoo: TinyZoo, tmp_path: Path) -> None:
    """Converters to mlx leave PEFT's settings in the file."""
    peft = zoo.lora("one")
    config = json.loads((peft / "adapter_config.json").read_text(encoding="utf-8")) | MLX_CONFIG
    folder = write_mlx(tmp_path / "both", mlx_tensors(peft), config)
    assert source_kind(folder) == "mlx"
    assert same_arrays(exported(peft, tmp_path / "peft"), exported(folder, tmp_path / "mlx"))
    whole = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(whole[:-1])
    refused(folder, BASE, tmp_path, AdapterError, r"adapters\.safetensors cannot be read")
    shutil.copyfile(peft / "adapter_model.safetensors", folder / "adapters.safetensors")
    assert source_kind(folder) == "peft"  # its own names, under the name of mlx_lm's file
    refused(folder, BASE, tmp_path, AdapterError, r"no adapter_model\.safetensors")
