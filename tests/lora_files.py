"""LoRA adapters of one set of factors in the formats of PEFT, mlx_lm and llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from edgecompose.adapters import convert_adapter
from edgecompose.bundle.adapter import Adapter, load_adapter
from edgecompose.bundle.quantization import dequantize
from edgecompose.bundle.specs import BaseSpec, SlotGroup
from edgecompose.errors import EdgeComposeError
from edgecompose.formats.gguf import interleaved
from edgecompose.formats.registry import detect_format
from edgecompose_export.cli import main
from tests import tiny

Float = npt.NDArray[np.float32]
Tensors = dict[str, Any]


def slots_of_llama(layers: int = 2, hidden: int = 64) -> BaseSpec:
    """What `export_base` says of the tiny Llama, without exporting it."""
    widths = {
        "q_proj": (hidden, 64),
        "k_proj": (hidden, 32),
        "v_proj": (hidden, 32),
        "o_proj": (64, hidden),
        "gate_proj": (hidden, 96),
        "up_proj": (hidden, 96),
        "down_proj": (96, hidden),
    }
    slots = tuple(SlotGroup(name, layers, *sizes) for name, sizes in widths.items())
    return BaseSpec(
        graph="decoder.onnx",
        tokenizer="tokenizer.json",
        identity="a" * 64,
        precision="fp32",
        context=512,
        kv_heads=2,
        head_size=16,
        vocabulary=300,
        end_tokens=(299,),
        slots=slots,
    )


BASE = dataclasses.replace(slots_of_llama(), architecture="llama")
MLX_CONFIG = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
FIELDS = {
    "general.type": "adapter",
    "general.architecture": "llama",
    "adapter.type": "lora",
    "adapter.lora.alpha": 8.0,
}


def format_of(path: Path) -> str | None:
    row = detect_format(path)
    return None if row is None else row.name


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
    convert_adapter(source, base, output, bits)
    return load_adapter(output, "x", base.slots, base.identity)


def same_arrays(one: Adapter, other: Adapter) -> bool:
    assert set(one.modules) == set(other.modules)
    return all(
        np.array_equal(getattr(getattr(one.modules[m], side), part), getattr(getattr(other.modules[m], side), part))
        and np.array_equal(one.modules[m].scaling, other.modules[m].scaling)
        for m in one.modules
        for side in "ab"
        for part in ("codes", "scales")
    )


def updates(adapter: Adapter) -> dict[str, Float]:
    """ΔW (L, in, out) of every module."""
    return {
        name: (m.scaling[:, None, None] * dequantize(m.a).swapaxes(1, 2) @ dequantize(m.b)).astype(np.float32)
        for name, m in adapter.modules.items()
    }


def refused(source: Path, base: BaseSpec, tmp_path: Path, error: type[EdgeComposeError], message: str) -> None:
    """Refused here, and by the command with exit code 1 and one line."""
    output = tmp_path / "out" / "a.safetensors"
    with pytest.raises(error, match=message):
        convert_adapter(source, base, output)
    tiny.write_json(tmp_path / "base" / "base.json", dataclasses.asdict(base))
    done = CliRunner().invoke(main, ["adapter", str(source), "--base", str(tmp_path / "base"), "-o", str(output)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.strip().splitlines()[-1].startswith("edgecompose-export: adapter ")
    assert not output.parent.exists()


def as_it_is(tensors: Tensors) -> None:
    """Change nothing: the settings are at fault."""


def without(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(key)


def with_tensor(key: str, value: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: value})


def poison(key: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[key] = tensors[key] + float("nan")

    return change
