"""Float checkpoints, and models that a blend is merged into."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")
pytest.importorskip("peft", reason="exports need the packages of edgecompose-export")

import torch
import transformers
from safetensors.torch import load_file, save_file

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.merged import MergedAdapter
from edgecompose.formats.checkpoint import (
    open_checkpoint,
    weights_identity,
)
from edgecompose.formats.merged_model import write_merged_model
from tests.lora_files import slots_of_llama

Float = npt.NDArray[np.float32]
Blend = Callable[[str], MergedAdapter]
IDS = [7, 80, 33, 260, 12, 5, 199, 41, 3]
WHOLE, SHARDED = "5GB", "60KB"
#: Targets of an adapter with few modules, where they are packed.
FEW = {"phi3": ["qkv_proj", "down_proj"], "granitemoehybrid": ["v_proj", "input_linear"]}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        result: Float = model(torch.tensor([IDS])).logits[0].float().numpy()
    return result


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite
