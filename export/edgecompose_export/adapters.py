"""A PEFT LoRA folder to quantised factors; whatever cannot be carried over is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from edgecompose.adapter import AdapterModule, adapter_to_bytes
from edgecompose.bundle import sha256_of
from edgecompose.errors import AdapterError, ExportError, SlotMismatch, UnsupportedAdapter
from edgecompose.manifest import AdapterSpec, BaseSpec, SlotGroup
from edgecompose.quantization import Bits, quantize, relative_error
from edgecompose.trimming import thresholds
from edgecompose_export.datasets import read_json
from edgecompose_export.slots import PACKED

Float = npt.NDArray[np.float32]
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"^(?:base_model\.model\.)?(.*?\.(\d+)\..*?(\w+))\.lora_(A|B)(?:\.\w+)?\.weight$")
#: Settings of PEFT that change what an adapter means in a way that low-rank slots cannot carry.
_REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "layer_replication", "megatron_config", "use_bdlora",
    "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
#: Initialisations that change the base's own weights, so that the factors mean nothing without them.
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: What PEFT takes where a config names no lora_alpha.
_PEFT_ALPHA = 8


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """Float factors of one module in one layer: a (r, in), b (out, r), and the scale alpha/r."""

    a: Float
    b: Float
    scale: float


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """What was written: the manifest's entry and the relative error of each module's ΔW factors."""

    spec: AdapterSpec
    errors: Mapping[str, float]


def export_adapter(folder: Path, base: BaseSpec, output: Path, bits: Bits = 4) -> ExportedAdapter:
    """Write a PEFT LoRA folder as one quantised adapter file.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        base: the exported base that the adapter is for.
        output: the .safetensors file to write.

    Raises:
        UnsupportedAdapter: DoRA, bias, modules_to_save, a mutating initialisation, or unknown tensors.
        SlotMismatch: made for another base; lists every slot that does not fit.
        AdapterError: unreadable, incomplete, or with values that are not finite.
        ExportError: `output` exists.
    """
    if output.exists():
        raise ExportError(f"'{output}' exists; remove it or give another file")
    config = read_config(folder)
    pairs = _split_packed(_read_pairs(folder, config), {g.name: g for g in base.slots})
    _check_slots(folder.name, pairs, {g.name: g for g in base.slots})
    modules, errors = {}, {}
    for group in base.slots:
        layers = pairs.get(group.name)
        if layers:
            modules[group.name], errors[group.name] = _quantize_group(layers, group, bits)
    source = {
        "name": folder.name, "weights_sha256": sha256_of(folder / WEIGHTS_FILE), "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"), "use_rslora": bool(config.get("use_rslora")),
        "errors": {name: round(error, 5) for name, error in errors.items()}, **_training_report(folder),
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(adapter_to_bytes(modules, bits=bits, base=base.identity, source=source))
    rank = max(m.rank for m in modules.values())
    mean = float(np.mean(list(errors.values())))
    return ExportedAdapter(AdapterSpec(output.name, rank, bits, base.identity, round(mean, 5), source), errors)


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, refused when it asks for something that slots cannot carry."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"adapter '{folder}' has no readable {CONFIG_FILE} ({error}); give a PEFT LoRA folder"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UnsupportedAdapter(f"adapter '{folder.name}' is of type {kind!r}; only LORA is supported")
    found = [name for name in _REFUSED if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']}")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_MUTATING):
        found.append(f"init_lora_weights={init} (convert it to plain LoRA when saving)")
    if found:
        raise UnsupportedAdapter(
            f"adapter '{folder.name}' uses {', '.join(found)}, which cannot be composed; not exported"
        )
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise AdapterError(f"adapter '{folder.name}' has rank {config.get('r')!r}; a positive whole number is wanted")
    _check_scales(folder.name, config)
    return config


def scale_of(module_path: str, config: Mapping[str, Any]) -> float:
    """PEFT's scale of one module: alpha / r, or alpha / sqrt(r) for rsLoRA, with the patterns applied."""
    rank = _pattern(module_path, config.get("rank_pattern") or {}, config["r"])
    alpha = _pattern(module_path, config.get("alpha_pattern") or {}, config.get("lora_alpha", _PEFT_ALPHA))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _check_scales(adapter: str, config: Mapping[str, Any]) -> None:
    """Refuse ranks and alphas that give no scale."""
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            raise AdapterError(f"adapter '{adapter}': {name} is {pattern!r:.60}; an object is wanted")
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise AdapterError(f"adapter '{adapter}': {name} has the unusable key {key!r}: {error}") from error
    alphas = [config.get("lora_alpha", _PEFT_ALPHA), *(config.get("alpha_pattern") or {}).values()]
    ranks = list((config.get("rank_pattern") or {}).values())
    for value in (*alphas, *ranks):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AdapterError(f"adapter '{adapter}': {value!r:.60} is no usable rank or alpha; a number is wanted")
    if any(rank < 1 for rank in ranks):
        raise AdapterError(f"adapter '{adapter}': rank_pattern has a rank below 1")


def _pattern(module_path: str, patterns: Mapping[str, Any], default: Any) -> Any:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module_path):
            return value
    return default


def _read_pairs(folder: Path, config: Mapping[str, Any]) -> dict[str, dict[int, _Pair]]:
    """Factors by module name and layer."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(f"adapter '{folder}' has no {WEIGHTS_FILE}; save it with safe_serialization=True")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            unknown = [key for key in keys if not _KEY.match(key)]
            if unknown:
                raise UnsupportedAdapter(
                    f"adapter '{folder.name}' holds tensors that have no slot: {', '.join(sorted(unknown)[:5])}"
                    f"{' ...' if len(unknown) > 5 else ''}"
                )
            tensors = {key: _as_float(file, key) for key in keys}
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"adapter '{folder.name}': {WEIGHTS_FILE} cannot be read: {error}") from error
    halves: dict[tuple[str, int, str], dict[str, Float]] = {}
    for key, tensor in tensors.items():
        found = _KEY.match(key)
        assert found is not None  # unknown keys were refused above
        sides = halves.setdefault((found[3], int(found[2]), found[1]), {})
        if found[4] in sides:
            raise UnsupportedAdapter(f"adapter '{folder.name}' has two factors for '{found[1]}'; one adapter is wanted")
        sides[found[4]] = tensor
    pairs: dict[str, dict[int, _Pair]] = {}
    for (module, layer, module_path), sides in halves.items():
        if layer in pairs.get(module, {}):
            raise UnsupportedAdapter(
                f"adapter '{folder.name}' has two modules '{module}' in layer {layer} ('{module_path}' is one); "
                "only one decoder can be adapted"
            )
        pairs.setdefault(module, {})[layer] = _pair(folder.name, module_path, sides, config)
    if not pairs:
        raise AdapterError(f"adapter '{folder.name}' holds no LoRA factor")
    return pairs


def _as_float(file: Any, key: str) -> Float:
    """One tensor as float32 (torch reads the file, since numpy has no bfloat16)."""
    return np.asarray(file.get_tensor(key).float().numpy(), np.float32)


def _pair(adapter: str, module_path: str, sides: Mapping[str, Float], config: Mapping[str, Any]) -> _Pair:
    if set(sides) != {"A", "B"}:
        raise AdapterError(f"adapter '{adapter}': '{module_path}' has lora_{'A' if 'A' in sides else 'B'} alone")
    a, b = sides["A"], sides["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(f"adapter '{adapter}': '{module_path}' has factors of shapes {a.shape} and {b.shape}")
    rank = _pattern(module_path, config.get("rank_pattern") or {}, config["r"])
    if rank != a.shape[0]:
        raise AdapterError(
            f"adapter '{adapter}': '{module_path}' has rank {a.shape[0]}, {CONFIG_FILE} says {rank}; "
            "the scale would be wrong, so it is not exported"
        )
    return _Pair(a, b, scale_of(module_path, config))


def _split_packed(pairs: dict[str, dict[int, _Pair]], groups: Mapping[str, SlotGroup]) -> dict[str, dict[int, _Pair]]:
    """A packed projection (qkv_proj, gate_up_proj) becomes one pair a part: the same A, its rows of B."""
    result = dict(pairs)
    for packed, parts in PACKED.items():
        if packed not in pairs or any(part not in groups for part in parts):
            continue
        layers = result.pop(packed)
        width = sum(groups[part].n_out for part in parts)
        wrong = [f"'layers.{i}.{packed}' is {width} wide here, {p.b.shape[0]} there" for i, p in sorted(layers.items())
                 if p.b.shape[0] != width]  # fmt: skip
        if wrong:
            raise SlotMismatch(f"adapter does not fit this base: {'; '.join(wrong)}; export it against its own base")
        start = 0
        for part in parts:
            end = start + groups[part].n_out
            result[part] = {i: _Pair(p.a, p.b[start:end], p.scale) for i, p in layers.items()}
            start = end
    return result


def _check_slots(adapter: str, pairs: Mapping[str, Mapping[int, _Pair]], groups: Mapping[str, SlotGroup]) -> None:
    problems = []
    for module, layers in sorted(pairs.items()):
        group = groups.get(module)
        if group is None:
            problems.append(f"'{module}' has no slot in this base")
            continue
        for layer, pair in sorted(layers.items()):
            have = (pair.a.shape[1], pair.b.shape[0])
            if layer >= group.layers:
                problems.append(f"'layers.{layer}.{module}': this base has {group.layers} layers")
            elif have != (group.n_in, group.n_out):
                problems.append(
                    f"'layers.{layer}.{module}' is {group.n_in}x{group.n_out} here, {have[0]}x{have[1]} there"
                )
    if problems:
        raise SlotMismatch(
            f"adapter '{adapter}' does not fit this base: {'; '.join(problems)}; export it against its own base"
        )


def _quantize_group(layers: Mapping[int, _Pair], group: SlotGroup, bits: Bits) -> tuple[AdapterModule, float]:
    rank = max(pair.a.shape[0] for pair in layers.values())
    a = np.zeros((group.layers, rank, group.n_in), np.float32)
    b = np.zeros((group.layers, rank, group.n_out), np.float32)
    scaling, ranks = np.zeros(group.layers, np.float32), np.zeros(group.layers, np.int32)
    for layer, pair in layers.items():
        own = pair.a.shape[0]
        a[layer, :own], b[layer, :own] = pair.a, pair.b.T
        scaling[layer], ranks[layer] = pair.scale, own
    quantized = quantize(a, bits), quantize(b, bits)
    error = max(relative_error(a, quantized[0]), relative_error(b, quantized[1]))
    limits = np.stack([thresholds(factor) for factor in quantized])
    return AdapterModule(*quantized, scaling, ranks, limits), error


def _training_report(folder: Path) -> dict[str, Any]:
    path = folder / "training.json"
    return {"training": read_json(path)} if path.is_file() else {}
