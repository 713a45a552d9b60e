"""Merged models, as transformers loads them, against PEFT's merge of the same blend; other checkpoints are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")
pytest.importorskip("peft", reason="exports need the packages of edgecompose-export")

import peft
import torch
import transformers
from safetensors.torch import load_file

from edgecompose.adapters import convert_adapter
from edgecompose.bundle.adapter import load_adapter
from edgecompose.engine.merged import MergedAdapter
from edgecompose.formats.architectures import architecture_of
from edgecompose.formats.checkpoint import (
    INDEX_FILE,
    from_float32,
    to_float32,
)
from edgecompose.formats.peft import write_peft_folder
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from tests.fixtures_tiny import TinyZoo
from tests.formats.checkpoints import (
    DTYPES,
    FEW,
    SHARDED,
    WHOLE,
    Blend,
    load,
    logits,
    merge,
    weights,
    write_checkpoint,
)
from tests.lora_files import slots_of_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def blend(zoo: TinyZoo, merger: Merger, tmp_path_factory: pytest.TempPathFactory) -> Blend:
    """A blend of two adapters, one of them in one layer and few modules, for an architecture."""

    def make(architecture: str) -> MergedAdapter:
        folder, adapters, base = tmp_path_factory.mktemp("blend"), [], slots_of_llama()
        few = FEW.get(architecture, ["q_proj", "v_proj", "down_proj"])
        for i, settings in enumerate([{}, {"r": 2, "target_modules": few, "layers_to_transform": [1]}]):
            lora = zoo.lora(f"merged{i}", architecture, **settings)
            convert_adapter(lora, base, folder / f"{i}.safetensors", 8)
            adapters.append(load_adapter(folder / f"{i}.safetensors", str(i), base.slots, base.identity))
        return merger.merge(adapters, (0.8, -0.5), MergeSettings())

    return make


def tensors_of(folder: Path) -> dict[str, Any]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def merged_by_peft(merged: MergedAdapter, architecture: str, folder: Path, checkpoint: Path, dtype: str) -> Any:
    write_peft_folder(merged, folder, dataclasses.replace(slots_of_llama(), architecture=architecture))
    return peft.PeftModel.from_pretrained(load(checkpoint, dtype), folder).merge_and_unload().eval()


@pytest.mark.parametrize("architecture", ["llama", "phi3", "granitemoehybrid"])
@pytest.mark.parametrize("size", [WHOLE, SHARDED])
def test_logits_are_those_of_the_model_that_peft_merges(
    zoo: TinyZoo, blend: Blend, tmp_path: Path, architecture: str, size: str
) -> None:
    folder = write_checkpoint(tmp_path / "float", zoo.model(architecture), size=size)
    assert (folder / INDEX_FILE).exists() == (size == SHARDED)
    merged = blend(architecture)
    written = merge(merged, folder, tmp_path / "merged")
    assert sorted(p.name for p in written) == sorted(p.name for p in folder.iterdir())
    ours, plain = logits(load(tmp_path / "merged")), logits(load(folder))
    theirs = logits(merged_by_peft(merged, architecture, tmp_path / "lora", folder, "F32"))
    assert np.abs(ours - theirs).max() <= 1e-5
    assert np.abs(ours - plain).max() > 0.01 * np.abs(plain).max()
    tokenizers = [transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("merged", "float")]
    assert tokenizers[0].encode("the cat") == tokenizers[1].encode("the cat")


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_short_floats_are_within_one_rounding_of_peft(
    zoo: TinyZoo, blend: Blend, tmp_path: Path, architecture: str, dtype: str
) -> None:
    folder = write_checkpoint(tmp_path / "float", zoo.model(architecture), dtype, SHARDED)
    merged = blend(architecture)
    merge(merged, folder, tmp_path / "merged")
    result, before = tensors_of(tmp_path / "merged"), tensors_of(folder)
    theirs = merged_by_peft(merged, architecture, tmp_path / "lora", folder, dtype).state_dict()
    digits = {"BF16": 8, "F16": 11}[dtype]
    changed = 0
    for name, ours in result.items():
        assert ours.dtype == DTYPES[dtype]
        a, b, w = (x.float().numpy() for x in (ours, theirs[name], before[name]))
        changed += not np.array_equal(a, w)
        # PEFT rounds the update and then the sum, we the sum alone
        rounding = np.ldexp(1.0, np.frexp(np.maximum(np.abs(a), np.abs(b)))[1] - digits)
        rounding += np.ldexp(0.5, np.frexp(b - w)[1] + 1 - digits)
        assert (np.abs(a - b) <= rounding).all(), name
    assert changed == (8 if architecture == "phi3" else 14)


def test_the_sum_is_rounded_once(zoo: TinyZoo, blend: Blend, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "float", zoo.model("llama"), "BF16")
    merged = blend("llama")
    merge(merged, folder, tmp_path / "merged")
    result, before = tensors_of(tmp_path / "merged"), tensors_of(folder)
    for module, (a, b) in merged.factors().items():
        for layer in range(2):
            name = f"{architecture_of('llama').path(layer, module)}.weight"
            expected = (before[name].float() + torch.tensor((a[layer].T @ b[layer]).T)).bfloat16()
            off = (result[name] != expected).float().mean()  # sums of another order may fall to the other side of a tie
            assert off <= 1e-3, name


def test_everything_else_is_the_same_bytes(zoo: TinyZoo, merger: Merger, tmp_path: Path) -> None:
    """An adapter of one module in one layer changes one tensor."""
    folder, base = write_checkpoint(tmp_path / "float", zoo.model("phi3"), size=SHARDED), slots_of_llama()
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "LICENSE").write_text("free", encoding="utf-8")
    (folder / "README.md").write_text("of the base", encoding="utf-8")
    lora = zoo.lora("one tensor", "llama", target_modules=["k_proj"], layers_to_transform=[1])
    convert_adapter(lora, base, tmp_path / "x.safetensors", 8)
    adapter = load_adapter(tmp_path / "x.safetensors", "x", base.slots, base.identity)
    merged = merger.merge([adapter], (1.0,), MergeSettings())
    written = merge(merged, folder, tmp_path / "merged")
    names = {path.name for path in folder.iterdir()} - {"adapter_config.json", "README.md"}
    assert {path.name for path in written} == names and "LICENSE" in names
    for name in names:
        if not name.endswith(".safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    before, after = tensors_of(folder), tensors_of(tmp_path / "merged")
    assert list(before) == list(after)
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"model.layers.1.self_attn.qkv_proj.weight"}
    rows = before["model.layers.1.self_attn.qkv_proj.weight"] != after["model.layers.1.self_attn.qkv_proj.weight"]
    assert rows.any(1).nonzero().flatten().tolist() == list(range(64, 96))  # k after the 64 of q, before the 32 of v


def test_other_towers_are_left_alone(zoo: TinyZoo, blend: Blend, tmp_path: Path) -> None:
    """A model of text and images has layers of the same names twice."""
    folder = write_checkpoint(tmp_path / "float", zoo.model("llama"))
    tower = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"

    def rename(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.startswith("model.")]:
            tensors[f"language_model.{key}"] = tensors.pop(key)
        tensors[tower] = torch.ones(96, 64)

    weights(rename)(folder)
    merge(blend("llama"), folder, tmp_path / "merged")
    before, after = tensors_of(folder), tensors_of(tmp_path / "merged")
    assert torch.equal(before[tower], after[tower])
    assert sum(not torch.equal(before[key], after[key]) for key in before) == 14


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_as_torch_rounds_them(dtype: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, np.uint32)
    ties = rng.integers(0, 1 << 16, 1000, np.uint32) << 16 | 0x8000
    special = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7FFFFFFF, 0x7F800001, 1], np.uint32)
    values = np.concatenate([bits, ties, special]).view(np.float32)
    content = from_float32(values, dtype)
    expected = torch.tensor(values).to(DTYPES[dtype]).float().numpy()
    result = to_float32(content, dtype)
    assert np.array_equal(result, expected, equal_nan=True)
    assert np.array_equal(np.signbit(result[~np.isnan(result)]), np.signbit(expected[~np.isnan(expected)]))
    remaining = ~np.isnan(result)
    again = from_float32(result, dtype)
    width = len(content) // len(values)
    one, other = (np.frombuffer(x, f"<u{width}")[remaining] for x in (content, again))
    assert np.array_equal(one, other)
