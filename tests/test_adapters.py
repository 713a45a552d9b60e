"""PEFT folders become quantised files with PEFT's own scales; what cannot be carried over is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgecompose.adapters import convert_adapter
from edgecompose.bundle.adapter import adapter_metadata, load_adapter
from edgecompose.bundle.quantization import dequantize
from edgecompose.bundle.specs import BaseSpec
from edgecompose.errors import AdapterError, EdgeComposeError, ExportError, SlotMismatch, UnsupportedAdapter
from tests import tiny
from tests.fixtures_tiny import TinyZoo
from tests.lora_files import slots_of_llama

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PATH = "base_model.model.model.layers.{}.{}.lora_{}.weight"
_PLACE = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)$")


BASE = slots_of_llama()
SCALINGS: dict[str, dict[str, Any]] = {
    "alpha over r": {"r": 4, "lora_alpha": 7},
    "alpha below r": {"r": 8, "lora_alpha": 1},
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "rank pattern": {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3}},
    "alpha pattern": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"v_proj": 5, "model.layers.0.self_attn.k_proj": 20}},
    "patterns are expressions": {"r": 2, "lora_alpha": 6, "rank_pattern": {r"layers\.0\..*_proj": 5}},
    "the first pattern counts": {"r": 2, "lora_alpha": 6, "alpha_pattern": {"layers.0.mlp.up_proj": 1, "up_proj": 9}},
    "an anchored pattern": {"r": 2, "lora_alpha": 6, "alpha_pattern": {"^model.layers.1.self_attn.o_proj": 11}},
    "rsLoRA with both": {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 4},
        "alpha_pattern": {"o_proj": 9},
    },
}


@pytest.fixture
def lora(zoo: TinyZoo, tmp_path: Path) -> Path:
    """A PEFT folder that may be changed."""
    return shutil.copytree(zoo.lora("one"), tmp_path / "one")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    tiny.write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def scales_of_peft(folder: Path, model: Path) -> Mapping[tuple[str, int], float]:
    base = transformers.AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    result = {}
    for path, module in loaded.named_modules():
        place = _PLACE.search(path)
        if place and hasattr(module, "lora_A"):
            result[place[2], int(place[1])] = float(module.scaling["default"])
    return result


@pytest.mark.parametrize("case", SCALINGS)
def test_scales_are_those_of_peft_for_every_module(zoo: TinyZoo, tmp_path: Path, case: str) -> None:
    folder = zoo.lora(f"scaling {case}", **SCALINGS[case])
    convert_adapter(folder, BASE, tmp_path / "a.safetensors", 8)
    adapter = load_adapter(tmp_path / "a.safetensors", "a", BASE.slots, BASE.identity)
    expected = scales_of_peft(folder, zoo.model("llama"))
    assert len(expected) == 14
    for (module, layer), scale in expected.items():
        assert adapter.modules[module].scaling[layer] == pytest.approx(scale, rel=1e-6), (module, layer)
    assert (len(set(expected.values())) > 1) == ("pattern" in case or "both" in case)


def test_factors_and_ranks_are_those_of_the_folder(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = zoo.lora("ranks", r=4, rank_pattern={"layers.0.self_attn.q_proj": 2, "v_proj": 1})
    made = convert_adapter(folder, BASE, tmp_path / "a.safetensors", 8)
    adapter = load_adapter(tmp_path / "a.safetensors", "a", BASE.slots, BASE.identity)
    tensors = load_file(folder / WEIGHTS)
    query = adapter.modules["q_proj"]
    assert query.ranks.tolist() == [2, 4]
    assert adapter.modules["v_proj"].ranks.tolist() == [1, 1]
    assert (adapter.rank, made.spec.rank, made.spec.bits, made.spec.base) == (4, 4, 8, BASE.identity)
    a, b = dequantize(query.a), dequantize(query.b)
    for layer, rank in enumerate(query.ranks):
        assert not a[layer, rank:].any()
        assert not b[layer, rank:].any()
        for side, result in (("A", a[layer, :rank]), ("B", b[layer, :rank].T)):
            expected = tensors[PATH.format(layer, "self_attn.q_proj", side)].numpy()
            assert np.abs(result - expected).max() <= 0.006 * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 0.03, 0.15), (8, 0.002, 0.01)])
def test_the_error_of_every_module_is_recorded(
    zoo: TinyZoo, tmp_path: Path, bits: Any, least: float, most: float
) -> None:
    made = convert_adapter(zoo.lora("one"), BASE, tmp_path / "a.safetensors", bits)
    assert set(made.errors) == {group.name for group in BASE.slots}
    assert all(least < error < most for error in made.errors.values())
    assert made.spec.error == pytest.approx(np.mean(list(made.errors.values())), abs=1e-5)
    assert made.spec.source["errors"] == {name: round(error, 5) for name, error in made.errors.items()}
    assert json.loads(adapter_metadata(tmp_path / "a.safetensors")["source"]) == made.spec.source
    assert made.spec.source["name"] == "one"
    assert made.spec.source["lora_alpha"] == 8


def test_the_same_folder_gives_the_same_bytes(zoo: TinyZoo, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert_adapter(zoo.lora("one"), BASE, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_layers_and_modules_that_are_left_alone_have_no_effect(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = zoo.lora("partial", target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    convert_adapter(folder, BASE, tmp_path / "a.safetensors", 8)
    adapter = load_adapter(tmp_path / "a.safetensors", "a", BASE.slots, BASE.identity)
    assert set(adapter.modules) == {"q_proj", "down_proj"}
    for module in adapter.modules.values():
        assert module.scaling.tolist() == [0, 2]
        assert module.ranks.tolist() == [0, 4]
        assert not dequantize(module.a)[0].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_number_formats_are_read(lora: Path, tmp_path: Path, dtype: str) -> None:
    expected = load_file(lora / WEIGHTS)[PATH.format(0, "mlp.up_proj", "B")]
    change_weights(lora, lambda tensors: tensors.update({k: v.to(getattr(torch, dtype)) for k, v in tensors.items()}))
    convert_adapter(lora, BASE, tmp_path / "a.safetensors", 8)
    adapter = load_adapter(tmp_path / "a.safetensors", "a", BASE.slots, BASE.identity)
    assert np.allclose(dequantize(adapter.modules["up_proj"].b)[0].T, expected, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["default", "bare"])
def test_other_spellings_of_keys_are_read(lora: Path, tmp_path: Path, form: str) -> None:
    """Older PEFT wrote the adapter's name, and some tools leave the prefix out."""

    def rename(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            other = key.replace(".weight", ".default.weight") if form == "default" else key.split(".model.", 1)[1]
            tensors[other] = tensors.pop(key)

    convert_adapter(lora, BASE, tmp_path / "a.safetensors", 8)
    change_weights(lora, rename)
    convert_adapter(lora, BASE, tmp_path / "b.safetensors", 8)
    one, other = (load_adapter(tmp_path / f"{n}.safetensors", n, BASE.slots, BASE.identity) for n in "ab")
    assert all(np.array_equal(one.modules[m].a.codes, other.modules[m].a.codes) for m in one.modules)
    assert set(one.modules) == set(other.modules)


_Q = PATH.format(0, "self_attn.q_proj", "{}")


def _put(key: str, value: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({key: value()})


def _poison(value: float) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[_Q.format("B")][3, 1] = value

    return change


def _second_tower(tensors: dict[str, Any]) -> None:
    """Another module of the same name and layer, as adapters of vision models have."""
    for side in "AB":
        key = _Q.format(side)
        tensors[key.replace("model.layers", "vision.layers")] = tensors[key] * 2


def _three_dimensions(tensors: dict[str, Any]) -> None:
    tensors[_Q.format("A")] = tensors[_Q.format("A")][None].contiguous()


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], type[EdgeComposeError], str]] = {
    **{
        f"tensor {key}": (
            _put(f"base_model.model.{key}", lambda: torch.ones(4, 64)),
            UnsupportedAdapter,
            f"{re.escape(key)}; it was trained with new tokens",
        )
        for key in (
            "lm_head.weight",
            "lm_head.lora_A.weight",
            "model.embed_tokens.weight",
            "model.embed_tokens.lora_embedding_A",
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
        )
    },
    "vision": (
        _put(
            "base_model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight", lambda: torch.ones(4, 64)
        ),
        UnsupportedAdapter,
        "no slot: base_model.model.vision_tower",
    ),
    "bias tensor": (
        _put("base_model.model.model.layers.0.self_attn.q_proj.bias", lambda: torch.ones(64)),
        UnsupportedAdapter,
        "q_proj.bias",
    ),
    "A alone": (lambda tensors: tensors.pop(_Q.format("B")), AdapterError, r"0\.self_attn\.q_proj' has lora_A alone"),
    "B alone": (lambda tensors: tensors.pop(_Q.format("A")), AdapterError, r"0\.self_attn\.q_proj' has lora_B alone"),
    "NaN": (_poison(float("nan")), AdapterError, "not finite"),
    "infinity": (_poison(float("-inf")), AdapterError, "not finite"),
    "unlike ranks": (_put(_Q.format("A"), lambda: torch.ones(3, 64)), AdapterError, r"factors of shapes \(3, 64\)"),
    "three dimensions": (_three_dimensions, AdapterError, "factors of shapes"),
    "nothing": (lambda tensors: tensors.clear(), AdapterError, "holds no LoRA factor"),
    "two towers": (_second_tower, EdgeComposeError, "vision"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_cannot_be_right_are_refused(lora: Path, tmp_path: Path, case: str) -> None:
    change, error, message = BROKEN[case]
    change_weights(lora, change)
    with pytest.raises(error, match=message):
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_files_that_cannot_be_read_are_refused(lora: Path, tmp_path: Path) -> None:
    output, weights = tmp_path / "a.safetensors", lora / WEIGHTS
    whole = weights.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 100):
        weights.write_bytes(content)
        with pytest.raises(AdapterError, match=rf"'one': {WEIGHTS} cannot be read"):
            convert_adapter(lora, BASE, output)
    weights.unlink()
    with pytest.raises(AdapterError, match=f"has no {WEIGHTS}; save it with safe_serialization"):
        convert_adapter(lora, BASE, output)
    for content in (b"{", b"\xff", b""):
        (lora / CONFIG).write_bytes(content)
        with pytest.raises(AdapterError, match=f"{CONFIG} cannot be read as JSON"):
            convert_adapter(lora, BASE, output)
    (lora / CONFIG).write_text("[]", encoding="utf-8")
    with pytest.raises(UnsupportedAdapter, match="is of type 'list'"):
        convert_adapter(lora, BASE, output)
    with pytest.raises(AdapterError, match="absent' is missing; give a LoRA file of llama.cpp"):
        convert_adapter(tmp_path / "absent", BASE, output)


def test_an_adapter_of_another_base_is_refused_with_every_slot(lora: Path, tmp_path: Path) -> None:
    narrow = slots_of_llama(layers=1, hidden=32)
    slots = tuple(group for group in narrow.slots if group.name != "down_proj")
    other = BaseSpec(
        graph="d",
        tokenizer="t",
        identity="c" * 64,
        precision="fp32",
        context=512,
        kv_heads=2,
        head_size=16,
        vocabulary=300,
        end_tokens=(299,),
        slots=slots,
    )
    with pytest.raises(SlotMismatch) as caught:
        convert_adapter(lora, other, tmp_path / "a.safetensors")
    message = str(caught.value)
    for group in slots:
        assert f"'layers.0.{group.name}' is {group.n_in}x{group.n_out} in this base" in message
        assert f"'layers.1.{group.name}': this base has 1 layers" in message
    assert "'down_proj' has no slot in this base" in message
    assert "'layers.0.q_proj' is 32x64 in this base, 64x64 in the adapter" in message


def test_a_file_for_another_base_of_the_same_shape_is_refused(lora: Path, tmp_path: Path) -> None:
    convert_adapter(lora, BASE, tmp_path / "a.safetensors")
    with pytest.raises(SlotMismatch, match="was exported against base aaaaaaaaaaaa…, this base is dddddddddddd…"):
        load_adapter(tmp_path / "a.safetensors", "a", BASE.slots, "d" * 64)


@pytest.mark.parametrize(
    "rows",
    [-32, 32],
)
def test_a_packed_projection_of_another_width_is_refused(zoo: TinyZoo, tmp_path: Path, rows: int) -> None:
    """A qkv of 64 + 32 + 32 rows is not one of 64 + 48 + 48, though all its parts can be cut out of it."""
    folder = shutil.copytree(zoo.lora("packed", "phi3", target_modules=["qkv_proj"]), tmp_path / "packed")

    def resize(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if "lora_B" in key]:
            whole = torch.cat([tensors[key], torch.ones(max(rows, 0), tensors[key].shape[1])])
            tensors[key] = whole[: 128 + rows].contiguous()

    change_weights(folder, resize)
    with pytest.raises(SlotMismatch):
        convert_adapter(folder, BASE, tmp_path / "a.safetensors")


def test_an_output_that_exists_is_not_overwritten(lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(ExportError, match="exists"):
        convert_adapter(lora, BASE, output)
    assert output.read_bytes() == b"mine"


def test_a_training_report_goes_along(lora: Path, tmp_path: Path) -> None:
    tiny.write_json(lora / "training.json", {"steps": 7})
    made = convert_adapter(lora, BASE, tmp_path / "deep" / "er" / "a.safetensors")
    assert made.spec.source["training"] == {"steps": 7}


def test_a_damaged_training_report_is_refused(lora: Path, tmp_path: Path) -> None:
    (lora / "training.json").write_text("{", encoding="utf-8")
    with pytest.raises(EdgeComposeError, match=r"training\.json"):
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")
