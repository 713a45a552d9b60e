"""Adapter folders of mlx_lm: reads them to float factors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors

from edgecompose.bundle.files import sha256_of
from edgecompose.errors import AdapterError, UnsupportedAdapter
from edgecompose.formats.lora import (
    CONFIG_FILE,
    LARGEST_RANK,
    Half,
    LoraSource,
    Side,
    check_scale,
    pair_up,
    place_of,
    read_adapter_config,
    read_tensors,
    refuse_unknown,
)

WEIGHTS_FILE = "adapters.safetensors"
_PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"^(.+)\.lora_(a|b)$")
#: Experts that mlx_lm keeps in one tensor.
_FUSED = re.compile(r"switch_mlp|\.experts\.")


def is_mlx_folder(path: Path) -> bool:
    """Whether a folder holds an adapter of mlx_lm, and not one of PEFT.

    Converters write configs with the settings of both; then the weights decide.
    """
    if not (path / CONFIG_FILE).is_file():
        return False
    try:
        config = read_adapter_config(path)
    except AdapterError:
        return False
    if not isinstance(config, dict):
        return False
    has_weights = (path / WEIGHTS_FILE).is_file()
    if "peft_type" in config:
        return has_weights and not (path / _PEFT_WEIGHTS_FILE).is_file() and _has_names_of_mlx(path / WEIGHTS_FILE)
    return "fine_tune_type" in config or "lora_parameters" in config or has_weights


def read_mlx_folder(folder: Path) -> LoraSource:
    """The factors of a folder that holds adapter_config.json and adapters.safetensors.

    mlx_lm keeps A as (in, r) and B as (r, out); both are transposed.

    Raises:
        UnsupportedAdapter: DoRA, full fine-tuning, fused experts, a scale of unclear meaning, or unknown tensors.
        AdapterError: unreadable or incomplete.
    """
    name, path = folder.name, folder / WEIGHTS_FILE
    config = read_adapter_config(folder)
    rank, scale = _rank_and_scale(name, config)
    if not path.is_file():
        raise AdapterError(f"adapter '{folder}' has no {WEIGHTS_FILE}, which mlx_lm writes; give its whole folder")
    halves, unknown = [], []
    for key, values in read_tensors(path, name):
        if key.endswith(".m"):
            raise UnsupportedAdapter(f"adapter '{name}' holds '{key}', a magnitude of DoRA; it cannot be composed")
        if _FUSED.search(key):
            raise UnsupportedAdapter(f"adapter '{name}' holds '{key}', of fused experts; they have no slots")
        match = _KEY.match(key)
        place = place_of(match[1]) if match else None
        if match is None or place is None:
            unknown.append(key)
        else:
            halves.append(Half(match[1], *place, cast(Side, match[2].upper()), np.ascontiguousarray(values.T)))
    refuse_unknown(name, unknown)

    def scale_of(module_path: str, own: int) -> float:
        if own != rank:
            raise AdapterError(
                f"adapter '{name}': '{module_path}' has rank {own}, {CONFIG_FILE} says {rank}; "
                "the folder mixes two adapters"
            )
        return scale

    about = {"name": name, "kind": "mlx", "weights_sha256": sha256_of(path), "r": rank, "scale": scale}
    return LoraSource(name, pair_up(name, halves, scale_of), about)


def _has_names_of_mlx(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return any(_KEY.match(key) for key in file.keys())  # noqa: SIM118 (it is no mapping)
    except (OSError, safetensors.SafetensorError):
        return True  # its reader says what is wrong


def _rank_and_scale(adapter: str, config: Any) -> tuple[int, float]:
    """Rank, and what the product of the factors is multiplied by.

    That was scale * alpha / rank up to version 0.14, and is scale since then, though alpha stayed in configs for a
    while. Versions up to 0.18 write `lora_layers`, later ones `num_layers`: only `lora_layers` with alpha is unclear.
    """
    kind = config.get("fine_tune_type") or ("dora" if config.get("use_dora") else "lora")
    if kind != "lora":
        raise UnsupportedAdapter(f"adapter '{adapter}' has fine_tune_type {kind!r:.60}; only 'lora' can be composed")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        raise AdapterError(f"adapter '{adapter}': {CONFIG_FILE} has no lora_parameters, expected rank and scale there")
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= LARGEST_RANK:
        raise AdapterError(
            f"adapter '{adapter}' has rank {rank!r:.60}, expected a positive whole number up to {LARGEST_RANK}"
        )
    check_scale(adapter, "scale in lora_parameters", scale)
    alpha = parameters.get("alpha", rank)
    if "num_layers" not in config and alpha != rank:
        raise UnsupportedAdapter(
            f"adapter '{adapter}' has scale {scale} and alpha {alpha!r:.60}, and mlx_lm up to 0.14 multiplied by "
            f"scale * alpha / rank, later by scale; put what was meant into scale, and remove alpha from {CONFIG_FILE}"
        )
    return rank, float(cast(float, scale))
