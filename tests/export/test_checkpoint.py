"""A base of any kind as a float model: transformers computes from the conversion what it computes from the original."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")

import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from edgecompose.errors import ExportError
from edgecompose.formats.checkpoint import BASE_KEY, INDEX_FILE, open_checkpoint, read_shard
from edgecompose.retrieval.examples import Example
from edgecompose_export.base import checkpoint
from edgecompose_export.base.checkpoint import DType, load_model, write_checkpoint
from edgecompose_export.base.source import open_base
from edgecompose_export.training.batches import TrainSettings
from edgecompose_export.training.train import train_adapter
from tests import gguf_models, tiny
from tests.fixtures_tiny import TinyZoo

pytestmark = pytest.mark.slow

Float = npt.NDArray[np.float32]
#: Longer than every window, and than the original contexts of LongRoPE, YaRN and Llama 3's scaling.
LENGTH = 150


def logits(model: torch.nn.Module, length: int = LENGTH) -> Float:
    ids = torch.tensor(np.random.default_rng(3).integers(0, 290, (1, length)))
    with torch.no_grad():
        values = model(ids).logits[0].float().numpy()
    return np.asarray(values)


def original(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def distance(one: Float, other: Float) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("name", gguf_models.MODELS)
def test_a_gguf_file_gives_the_model_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    source = gguf_models.MODELS[name].write(tmp_path / "source")
    file = gguf_models.write_gguf(tmp_path / "x.gguf", source)
    exact = logits(original(source))
    base = open_base(file)
    assert distance(logits(load_model(base)), exact) < 1e-4
    write_checkpoint(base, tmp_path / "folder")
    assert distance(logits(original(tmp_path / "folder")), exact) < 1e-4
    again = open_base(tmp_path / "folder")  # it is a base that can be exported
    assert again.tokenizer.end_tokens == base.tokenizer.end_tokens
    assert again.weights.config.widths == base.weights.config.widths


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "BF16"])
def test_quantised_rows_are_their_values(kind: str, tmp_path: Path) -> None:
    source = gguf_models.MODELS["llama"].write(tmp_path / "source", hidden_size=256, intermediate_size=256)
    base = open_base(gguf_models.write_gguf(tmp_path / "x.gguf", source, kind))
    write_checkpoint(base, tmp_path / "folder")
    weights = load_file(tmp_path / "folder/model.safetensors")
    for tensor, stored in (("0.q_proj.weight", "0.self_attn.q_proj"), ("2.down_proj.weight", "2.mlp.down_proj")):
        assert np.array_equal(base.weights.floats(tensor), weights[f"model.layers.{stored}.weight"])


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_a_folder_keeps_its_numbers(architecture: str, zoo: TinyZoo, tmp_path: Path) -> None:
    source = zoo.model(architecture)
    first = load_torch(source / "model.safetensors")
    dtypes: tuple[DType, ...] = ("float32", "bfloat16", "float16")
    for dtype in dtypes:
        write_checkpoint(open_base(source), tmp_path / dtype, dtype)
        kind = getattr(torch, dtype)
        again = load_torch(tmp_path / dtype / "model.safetensors")
        assert set(again) == set(first)
        assert all(torch.equal(again[name], values.to(kind)) for name, values in first.items())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / dtype / name).read_bytes() == (source / name).read_bytes()


def test_weights_that_stand_one_short_are_not_rounded_twice(tmp_path: Path) -> None:
    source = gguf_models.MODELS["gemma3"].write(tmp_path / "source")
    write_checkpoint(open_base(source), tmp_path / "folder")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "folder"))
    assert all(np.array_equal(again[name], values) for name, values in first.items())


def test_large_weights_are_split(zoo: TinyZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(open_base(zoo.model("llama")), tmp_path / "whole")
    monkeypatch.setattr(checkpoint, "_LARGEST_SHARD", 100_000)
    base = open_base(zoo.model("llama"))
    write_checkpoint(base, tmp_path / "split")
    index = json.loads((tmp_path / "split" / INDEX_FILE).read_text(encoding="utf-8"))
    files = sorted(path.name for path in (tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert open_checkpoint(tmp_path / "split").is_recorded(base.identity)
    assert np.array_equal(logits(original(tmp_path / "split")), logits(original(tmp_path / "whole")))


def test_numbers_beyond_float16_are_refused(zoo: TinyZoo, tmp_path: Path) -> None:
    source = tmp_path / "large"
    write_checkpoint(open_base(zoo.model("llama")), source)
    metadata = {**read_shard(source / "model.safetensors").metadata}
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(weights, source / "model.safetensors", {k: v for k, v in metadata.items() if k != BASE_KEY})
    with pytest.raises(ExportError, match=r"'model.layers.1.mlp.up_proj.weight' holds 1e\+05.*--dtype bfloat16"):
        write_checkpoint(open_base(source), tmp_path / "half", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]
    write_checkpoint(open_base(source), tmp_path / "half", "bfloat16")


def test_no_space_leaves_nothing(zoo: TinyZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(values: Float, dtype: str) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "from_float32", full)
    with pytest.raises(ExportError, match="folder' cannot be written: No space left on device"):
        write_checkpoint(open_base(zoo.model("llama")), tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gemma3", "llama-3.2"])
def test_an_adapter_is_trained_on_a_gguf_file_as_on_its_folder(name: str, tmp_path: Path) -> None:
    model = gguf_models.MODELS[name]
    source = model.write(tmp_path / "source")
    file = gguf_models.write_gguf(tmp_path / "x.gguf", source)
    examples = [Example(f"{a} and {b}?", "yes" if a < b else "no") for a in range(4) for b in range(2)]
    settings = TrainSettings(rank=2, alpha=4, epochs=2, learning_rate=1e-2, batch=4, max_length=64)
    reports = [train_adapter(open_base(p), examples, tmp_path / p.stem, settings) for p in (file, source)]
    assert reports[0]["final_loss"] == pytest.approx(reports[1]["final_loss"], rel=1e-3)
    assert reports[0]["base"] == open_base(file).identity != reports[1]["base"]


def test_the_vocabulary_of_the_tests() -> None:
    """`logits` draws ids that every model here has."""
    assert tiny.VOCABULARY >= 290
