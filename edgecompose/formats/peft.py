"""PEFT LoRA folders: reads them to float factors, and writes a blend as one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from edgecompose.bundle.atomic import new_files
from edgecompose.bundle.files import sha256_of
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.merged import MergedAdapter, require_adapters
from edgecompose.errors import AdapterError, MergeError, UnsupportedAdapter
from edgecompose.formats.architectures import architecture_of
from edgecompose.formats.lora import (
    CONFIG_FILE,
    Half,
    LoraSource,
    Side,
    is_of_vocabulary,
    model_factors,
    pair_up,
    place_of,
    read_adapter_config,
    read_tensors,
    refuse_unknown,
)

WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.\w+)?\.weight$")
#: Settings of PEFT that change what an adapter means in a way that low-rank slots cannot carry.
_REFUSED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "megatron_config",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
#: Initialisations that change the base's own weights, so that the factors mean nothing without them.
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: What PEFT takes where a config names no lora_alpha.
_PEFT_ALPHA = 8


def is_peft_folder(path: Path) -> bool:
    """Whether a folder has an `adapter_config.json`; mlx_lm writes one too, so its own test comes first."""
    return (path / CONFIG_FILE).is_file()


def read_peft_folder(folder: Path) -> LoraSource:
    """The factors of a folder that holds adapter_config.json and adapter_model.safetensors.

    Raises:
        UnsupportedAdapter: DoRA, bias, modules_to_save, a mutating initialisation, or unknown tensors.
        AdapterError: unreadable or incomplete.
    """
    config, path = read_config(folder), folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(f"adapter '{folder}' has no {WEIGHTS_FILE}; save it with safe_serialization=True")
    halves, unknown = [], []
    for key, values in read_tensors(path, folder.name):
        match = _KEY.match(key)
        place = place_of(match[1]) if match else None
        if match is None or place is None:
            unknown.append(key)
        else:
            halves.append(Half(match[1], *place, cast(Side, match[2]), values))
    refuse_unknown(folder.name, unknown)

    def scale(module_path: str, rank: int) -> float:
        if rank != (expected := _rank_of(module_path, config)):
            raise AdapterError(
                f"adapter '{folder.name}': '{module_path}' has rank {rank}, {CONFIG_FILE} says {expected}; "
                "the scale would be wrong, so it is not exported"
            )
        return scale_of(module_path, config)

    about = {
        "name": folder.name,
        "weights_sha256": sha256_of(path),
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "use_rslora": bool(config.get("use_rslora")),
    }
    return LoraSource(folder.name, pair_up(folder.name, halves, scale), about)


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, refused when it asks for something that slots cannot carry."""
    config = read_adapter_config(folder)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UnsupportedAdapter(f"adapter '{folder.name}' is of type {kind!r}; only LORA is supported")
    refused = [name + _new_tokens(name, config[name]) for name in _REFUSED if config.get(name)]
    if config.get("bias", "none") != "none":
        refused.append(f"bias={config['bias']}")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_MUTATING):
        refused.append(f"init_lora_weights={init} (convert it to plain LoRA when saving)")
    if refused:
        raise UnsupportedAdapter(
            f"adapter '{folder.name}' uses {', '.join(refused)}, which cannot be composed; not exported"
        )
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise AdapterError(f"adapter '{folder.name}' has rank {config.get('r')!r}, expected a positive whole number")
    _check_scales(folder.name, config)
    return config


def scale_of(module_path: str, config: Mapping[str, Any]) -> float:
    """PEFT's scale of one module: alpha / r, or alpha / sqrt(r) for rsLoRA, with the patterns applied."""
    rank = _rank_of(module_path, config)
    alpha = _pattern(module_path, config.get("alpha_pattern") or {}, config.get("lora_alpha", _PEFT_ALPHA))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


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
    row = architecture_of(base.architecture)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    ranks: dict[str, int] = {}
    for name, (a, b) in model_factors(merged.factors(), base, row.paths).items():
        for layer in range(a.shape[0]):
            path = f"base_model.model.{row.path(layer, name)}"
            tensors[f"{path}.lora_A.weight"] = a[layer]
            tensors[f"{path}.lora_B.weight"] = np.ascontiguousarray(b[layer].T)
        ranks[row.paths[name].split(".")[-1]] = a.shape[1]
    paths = [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
    with new_files(folder, last=CONFIG_FILE) as work:
        present = [path.name for path in paths if path.exists()]
        if present:
            raise MergeError(f"'{folder}' already holds {', '.join(present)}; give another folder")
        (work / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        (work / CONFIG_FILE).write_text(json.dumps(_config(ranks, base.source), indent=1) + "\n", encoding="utf-8")
    return paths


def _new_tokens(setting: str, value: Any) -> str:
    """What a refused setting means where it changes the vocabulary."""
    if setting == "trainable_token_indices":
        return " (trained with new tokens)"
    if setting != "modules_to_save":
        return ""
    modules = [str(name) for name in value] if isinstance(value, list) else [str(value)]
    meaning = ": trained with new tokens" if any(is_of_vocabulary(name) for name in modules) else ""
    return f" ({', '.join(modules)}{meaning})"


def _rank_of(module_path: str, config: Mapping[str, Any]) -> Any:
    return _pattern(module_path, config.get("rank_pattern") or {}, config["r"])


def _check_scales(adapter: str, config: Mapping[str, Any]) -> None:
    """Refuse ranks and alphas that give no scale."""
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            raise AdapterError(f"adapter '{adapter}': {name} is {pattern!r:.60}, expected an object")
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise AdapterError(f"adapter '{adapter}': {name} has the unusable key {key!r}: {error}") from error
    alphas = [config.get("lora_alpha", _PEFT_ALPHA), *(config.get("alpha_pattern") or {}).values()]
    ranks = list((config.get("rank_pattern") or {}).values())
    for value in (*alphas, *ranks):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AdapterError(f"adapter '{adapter}': {value!r:.60} is no usable rank or alpha; expected a number")
    if any(rank < 1 for rank in ranks):
        raise AdapterError(f"adapter '{adapter}': rank_pattern has a rank below 1")


def _pattern(module_path: str, patterns: Mapping[str, Any], default: Any) -> Any:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module_path):
            return value
    return default


def _config(ranks: dict[str, int], base: str) -> dict[str, Any]:
    largest = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
