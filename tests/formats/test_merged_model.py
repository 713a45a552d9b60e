"""Merged models, as transformers loads them, against PEFT's merge of the same blend; other checkpoints are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="exports want the packages of edgecompose-export")
pytest.importorskip("peft", reason="exports want the packages of edgecompose-export")

import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgecompose.adapters import convert_adapter
from edgecompose.bundle.adapter import load_adapter
from edgecompose.bundle.atomic import new_folder
from edgecompose.bundle.files import sha256_of
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import CheckpointError, EdgeComposeError, ExportError, MergeError
from edgecompose.formats.architectures import architecture_of
from edgecompose.formats.checkpoint import (
    BASE_KEY,
    INDEX_FILE,
    from_float32,
    open_checkpoint,
    to_float32,
    weights_identity,
)
from edgecompose.formats.merged_model import write_merged_model
from edgecompose.formats.peft import write_peft_folder
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from edgecompose_export.base.checkpoint import DType, load_model
from edgecompose_export.base.checkpoint import write_checkpoint as convert
from edgecompose_export.base.source import open_base
from tests import tiny
from tests.fixtures_tiny import TinyZoo
from tests.lora_files import slots_of_llama

Float = npt.NDArray[np.float32]
Blend = Callable[[str], MergedAdapter]
IDS = [7, 80, 33, 260, 12, 5, 199, 41, 3]
WHOLE, SHARDED = "5GB", "60KB"
#: Targets of an adapter with few modules, where they are packed.
FEW = {"phi3": ["qkv_proj", "down_proj"], "granitemoehybrid": ["v_proj", "input_linear"]}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


def write_checkpoint(folder: Path, source: Path, dtype: str = "F32", size: str = WHOLE) -> Path:
    """A tiny model in a float type, whole or in shards, with its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype], local_files_only=True)
    model.save_pretrained(folder, max_shard_size=size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


def base_of(folder: Path) -> BaseSpec:
    return dataclasses.replace(slots_of_llama(), identity=weights_identity(folder))


def merge(blend: MergedAdapter, folder: Path, output: Path, base: BaseSpec | None = None) -> list[Path]:
    return write_merged_model(blend, open_checkpoint(folder), output, base or base_of(folder))


def load(folder: Path, dtype: str = "F32") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True).eval()


def logits(model: Any) -> Float:
    with torch.no_grad():
        found: Float = model(torch.tensor([IDS])).logits[0].float().numpy()
    return found


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
    found, before = tensors_of(tmp_path / "merged"), tensors_of(folder)
    theirs = merged_by_peft(merged, architecture, tmp_path / "lora", folder, dtype).state_dict()
    digits = {"BF16": 8, "F16": 11}[dtype]
    changed = 0
    for name, ours in found.items():
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
    found, before = tensors_of(tmp_path / "merged"), tensors_of(folder)
    for module, (a, b) in merged.factors().items():
        for layer in range(2):
            name = f"{architecture_of('llama').path(layer, module)}.weight"
            wanted = (before[name].float() + torch.tensor((a[layer].T @ b[layer]).T)).bfloat16()
            off = (found[name] != wanted).float().mean()  # sums of another order may fall to the other side of a tie
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

    _weights(rename)(folder)
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
    wanted = torch.tensor(values).to(DTYPES[dtype]).float().numpy()
    found = to_float32(content, dtype)
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found[~np.isnan(found)]), np.signbit(wanted[~np.isnan(wanted)]))
    kept = ~np.isnan(found)
    again = from_float32(found, dtype)
    width = len(content) // len(values)
    one, other = (np.frombuffer(x, f"<u{width}")[kept] for x in (content, again))
    assert np.array_equal(one, other)


# Of which base


def test_a_checkpoint_out_of_a_gguf_file_records_its_base(zoo: TinyZoo, blend: Blend, tmp_path: Path) -> None:
    file = tiny.write_gguf(tmp_path / "x.gguf", zoo.model("llama"))
    source, folder = open_base(file), tmp_path / "deep" / "float"
    assert convert(source, folder) == sha256_of(file)
    assert np.array_equal(logits(load(folder)), logits(load_model(source)))
    assert not {path.suffix for path in folder.iterdir()} - {".json", ".jinja", ".safetensors"}
    loaded, first = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, zoo.model("llama")))
    assert (loaded.bos_token, loaded.eos_token) == ("<|im_start|>", "<|im_end|>")  # as the file says
    message = [{"role": "user", "content": "a 12"}]
    assert loaded.apply_chat_template(message, tokenize=False) == first.apply_chat_template(message, tokenize=False)
    assert loaded.tokenize("12") == ["1", "2"]  # as llama.cpp splits digits
    base = dataclasses.replace(slots_of_llama(), identity=sha256_of(file))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.is_recorded(base.identity)
    read: list[int] = []
    write_merged_model(blend("llama"), checkpoint, tmp_path / "merged", base, advance=read.append)
    assert sum(read) <= checkpoint.bytes  # nothing was hashed
    with safe_open(tmp_path / "merged/model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # it is the base no longer
    with pytest.raises(CheckpointError, match="the bundle's base was exported from"):
        merge(blend("llama"), tmp_path / "merged", tmp_path / "again", base)
    with pytest.raises(ExportError, match="exists"):
        convert(source, folder)


def test_converted_types(zoo: TinyZoo, tmp_path: Path) -> None:
    dtypes: tuple[DType, ...] = ("float16", "bfloat16")
    for dtype in dtypes:
        identity = convert(open_base(zoo.model("qwen2")), tmp_path / dtype, dtype)
        assert identity == weights_identity(zoo.model("qwen2"))
        checkpoint = open_checkpoint(tmp_path / dtype)
        assert checkpoint.is_recorded(identity)
        assert {t.dtype for s in checkpoint.shards for t in s.tensors} == {"F16" if dtype == "float16" else "BF16"}
        assert json.loads((tmp_path / dtype / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype


def test_a_converted_folder_is_also_a_base_of_its_own(zoo: TinyZoo, tmp_path: Path) -> None:
    convert(open_base(zoo.model("llama")), tmp_path / "float")
    open_checkpoint(tmp_path / "float").check_base(weights_identity(tmp_path / "float"))


def test_the_identity_is_that_of_the_export(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "float", zoo.model("llama"), size=SHARDED)
    assert open_base(folder).identity == weights_identity(folder)


# Refused


def _config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        tiny.write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)

    return change


def _weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


_Q = "model.layers.0.self_attn.q_proj.weight"


def _leave(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    tiny.write_json(folder / INDEX_FILE, {"weight_map": {"a": "../x.safetensors"}})


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "quantised": (_config(quantization_config={"quant_method": "gptq"}), r"is quantised \(config\.json says so\)"),
    "8 bits": (_weights(lambda t: t.update({_Q: t[_Q].to(torch.int8)})), "q_proj.weight' is of type I8; F32, F16"),
    "double": (_weights(lambda t: t.update({_Q: t[_Q].double()})), "is of type F64"),
    "no weight": (_weights(lambda t: t.pop(_Q)), r"changes weights that the checkpoint lacks: layers\.0\.q_proj; give"),
    "another shape": (_weights(lambda t: t.update({_Q: t[_Q][:32].clone()})), r"\(32, 64\), expected \(64, 64\)"),
    "two decoders": (_weights(lambda t: t.update({f"eye.{_Q}": t[_Q].clone()})), "more than one 'q_proj' in layer 0"),
    "truncated": (_truncate, "model.safetensors' cannot be read"),
    "no safetensors": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "edgecompose-export checkpoint SOURCE -o FOLDER",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "a list": (lambda folder: tiny.write_json(folder / "config.json", []), "config.json is no object"),
    "an index that leaves": (_leave, "names no files beside it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_checkpoints_are_refused(zoo: TinyZoo, blend: Blend, tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    folder = write_checkpoint(tmp_path / "float", zoo.model("llama"))
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        merge(blend("llama"), folder, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_a_stranger_is_refused(zoo: TinyZoo, blend: Blend, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "float", zoo.model("llama"))
    base = base_of(folder)
    _weights(lambda t: t[_Q].mul_(1.001))(folder)
    with pytest.raises(CheckpointError, match=f"the bundle's base was exported from {base.identity[:12]}"):
        merge(blend("llama"), folder, tmp_path / "merged", base)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", BASE_KEY: "b" * 64})
    with pytest.raises(CheckpointError, match="give the folder that it was exported from"):
        merge(blend("llama"), folder, tmp_path / "merged", base)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path / "absent")


def test_what_cannot_be_written(zoo: TinyZoo, blend: Blend, tmp_path: Path) -> None:
    folder, output = write_checkpoint(tmp_path / "float", zoo.model("llama"), "F16"), tmp_path / "merged"
    with pytest.raises(MergeError, match="no adapter"):
        merge(MergedAdapter({}, "none"), folder, output)
    output.mkdir()
    with pytest.raises(MergeError, match="exists"):
        merge(blend("llama"), folder, output)
    output.rmdir()
    _weights(lambda t: t[_Q].fill_(65504.0))(folder)
    factors = {"q_proj": (np.full((2, 1, 64), 8.0, np.float32), np.full((2, 1, 64), 8.0, np.float32))}

    class Large(MergedAdapter):
        def factors(self) -> dict[str, tuple[Float, Float]]:
            return factors

    with pytest.raises(MergeError, match="values after merging that F16 cannot hold"):
        merge(Large(blend("llama").modules, "large"), folder, output)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(EdgeComposeError), new_folder(tmp_path / "x") as work:
        (work / "file").write_text("half", encoding="utf-8")
        raise EdgeComposeError("stop")
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "a" / "x") as work:
        (work / "file").write_text("all", encoding="utf-8")
    assert (tmp_path / "a/x/file").read_text(encoding="utf-8") == "all"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
