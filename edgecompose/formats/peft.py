"""A blend as a PEFT LoRA folder, so that other tools can load it; knows nothing of how it was chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.merged import MergedAdapter, require_adapters
from edgecompose.errors import MergeError
from edgecompose.formats.architectures import architecture_of
from edgecompose.formats.packing import model_factors


def write_peft_folder(merged: MergedAdapter, folder: Path, base: BaseSpec) -> list[Path]:
    """Write `adapter_config.json` and `adapter_model.safetensors` into `folder`, which is made if need be.

    The scale is 1 (alpha = r in every module): weights and scales of the parts are in the factors.

    Args:
        base: names the model and its architecture, and says how wide modules are.

    Raises:
        MergeError: the blend holds no adapter, or `folder` already holds one.
        BundleError: the base's architecture is not known.
    """
    require_adapters(merged)
    paths = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    taken = [path.name for path in paths if path.exists()]
    if taken:
        raise MergeError(f"'{folder}' already holds {', '.join(taken)}; give another folder")
    row = architecture_of(base.architecture)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    ranks: dict[str, int] = {}
    for name, (a, b) in model_factors(merged.factors(), base, row.paths).items():
        for layer in range(a.shape[0]):
            path = f"base_model.model.{row.path(layer, name)}"
            tensors[f"{path}.lora_A.weight"] = a[layer]
            tensors[f"{path}.lora_B.weight"] = np.ascontiguousarray(b[layer].T)
        ranks[row.paths[name].split(".")[-1]] = a.shape[1]
    folder.mkdir(parents=True, exist_ok=True)
    paths[1].write_bytes(save(tensors, metadata={"format": "pt"}))
    paths[0].write_text(json.dumps(_config(ranks, base.source), indent=1) + "\n", encoding="utf-8")
    return paths


def _config(ranks: dict[str, int], base: str) -> dict[str, Any]:
    largest = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": largest, "lora_alpha": largest, "rank_pattern": pattern, "alpha_pattern": pattern,
        "target_modules": sorted(ranks), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False,
    }  # fmt: skip
