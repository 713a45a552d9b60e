"""PEFT LoRA folders: reads them to float factors, and writes a blend as one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
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
    LARGEST_RANK,
    Half,
    LoraSource,
    Side,
    check_scale,
    is_of_vocabulary,
    model_factors,
    pair_up,
    place_of,
    read_adapter_config,
    read_tensors,
    refuse_unknown,
)
from edgecompose.guard.budget import Budget
from edgecompose.guard.patterns import Pattern

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
#: Steps that matching all modules with all patterns may take: seconds, where milliseconds are usual.
_MATCHING_STEPS = 10_000_000


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

    scales = PeftScales(folder.name, config)

    def scale(module_path: str, rank: int) -> float:
        if rank != (expected := scales.rank(module_path)):
            raise AdapterError(
                f"adapter '{folder.name}': '{module_path}' has rank {rank}, {CONFIG_FILE} says {expected}; "
                "the scale would be wrong, so it is not exported"
            )
        return scales.scale(module_path)

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
        raise UnsupportedAdapter(f"adapter '{folder.name}' is of type {kind!r:.60}; only LORA is supported")
    refused = [name + _new_tokens(name, config[name]) for name in _REFUSED if config.get(name)]
    if config.get("bias", "none") != "none":
        refused.append(f"bias={config['bias']!s:.40}")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_MUTATING):
        refused.append(f"init_lora_weights={init:.40} (convert it to plain LoRA when saving)")
    if refused:
        raise UnsupportedAdapter(
            f"adapter '{folder.name}' uses {', '.join(refused)}, which cannot be composed; not exported"
        )
    return config


class PeftScales:
    """Ranks and scales of modules, with the patterns of a config applied as PEFT applies them.

    Args:
        adapter: its name, for messages.
        config: `adapter_config.json`.

    Raises:
        AdapterError: a rank or alpha is no usable number, or a pattern cannot be matched.
    """

    def __init__(self, adapter: str, config: Mapping[str, Any]) -> None:
        self._adapter = adapter
        self._rank, self._alpha = config.get("r"), config.get("lora_alpha", _PEFT_ALPHA)
        self._by_root = bool(config.get("use_rslora"))
        self._budget = Budget(steps=_MATCHING_STEPS, size=0, output=0, exceeded=self._exceeded)
        self._ranks, self._alphas = self._patterns("rank_pattern", config), self._patterns("alpha_pattern", config)
        for rank in (self._rank, *(rank for _, rank in self._ranks)):
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= LARGEST_RANK:
                raise AdapterError(
                    f"adapter '{adapter}' has rank {rank!r:.60}, expected a positive whole number up to {LARGEST_RANK}"
                )
        for alpha in (self._alpha, *(alpha for _, alpha in self._alphas)):
            check_scale(adapter, "alpha", alpha)

    def rank(self, module_path: str) -> int:
        """The rank of a module."""
        return int(self._first(self._ranks, module_path, self._rank))

    def scale(self, module_path: str) -> float:
        """PEFT's scale of a module: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        rank = self.rank(module_path)
        alpha = self._first(self._alphas, module_path, self._alpha)
        return float(alpha / (math.sqrt(rank) if self._by_root else rank))

    @staticmethod
    def _first(patterns: Sequence[tuple[Pattern, Any]], module_path: str, default: Any) -> Any:
        return next((value for pattern, value in patterns if pattern.matches(module_path)), default)

    def _patterns(self, name: str, config: Mapping[str, Any]) -> list[tuple[Pattern, Any]]:
        values = config.get(name) or {}
        if not isinstance(values, dict):
            raise AdapterError(f"adapter '{self._adapter}': {name} is {values!r:.60}, expected an object")
        patterns = []
        for key, value in values.items():
            try:
                patterns.append((Pattern(rf"(.*\.)?({key})$", self._budget), value))
            except ValueError as error:
                raise AdapterError(
                    f"adapter '{self._adapter}': {name} has the unusable key {key!r:.80}: {error}; name the module"
                ) from error
        return patterns

    def _exceeded(self, what: str) -> AdapterError:
        return AdapterError(
            f"adapter '{self._adapter}': the keys of rank_pattern and alpha_pattern take too much {what} to match; "
            "name the modules"
        )


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
    modules = [f"{name!s:.40}" for name in value[:8]] if isinstance(value, list) else [f"{value!s:.40}"]
    meaning = ": trained with new tokens" if any(is_of_vocabulary(name) for name in modules) else ""
    return f" ({', '.join(modules)}{meaning})"


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
