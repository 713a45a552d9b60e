"""An adapter of any kind to quantised factors in the slots of a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.adapter import AdapterModule, adapter_to_bytes
from edgecompose.bundle.quantization import Bits, quantize, relative_error
from edgecompose.bundle.specs import AdapterSpec, BaseSpec, SlotGroup
from edgecompose.errors import AdapterError, ExportError, SlotMismatch
from edgecompose.formats.architectures import PACKED
from edgecompose.merging.sparsify import thresholds
from edgecompose_export.datasets import read_json
from edgecompose_export.gguf_source import is_gguf, read_gguf_lora
from edgecompose_export.lora_source import CONFIG_FILE, Kind, LoraPair, LoraSource, Pairs, read_adapter_config
from edgecompose_export.mlx_source import is_mlx_folder, read_mlx_folder
from edgecompose_export.peft_source import read_peft_folder

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """What was written: the manifest's entry and the relative error of each module's ΔW factors."""

    spec: AdapterSpec
    errors: Mapping[str, float]


def source_kind(path: Path) -> Kind | None:
    """What kind of adapter lies at `path`: None for a folder without adapter_config.json, and for other files.

    Raises:
        AdapterError: a file is called .gguf and is none.
    """
    if path.is_file():
        return "gguf" if is_gguf(path) else None
    if not (path / CONFIG_FILE).is_file():
        return None
    try:
        return "mlx" if is_mlx_folder(path, read_adapter_config(path)) else "peft"
    except AdapterError:
        return "peft"


def read_source(path: Path, base: BaseSpec) -> LoraSource:
    """The float factors of an adapter of any kind.

    Raises:
        AdapterError: no adapter lies there, or it cannot be used; see the reader of each kind.
    """
    readers: Mapping[Kind, Callable[[], LoraSource]] = {
        "peft": lambda: read_peft_folder(path),
        "mlx": lambda: read_mlx_folder(path),
        "gguf": lambda: read_gguf_lora(path, base),
    }
    kind = source_kind(path)
    if kind is None:
        what = "is a file, but no GGUF file" if path.is_file() else f"has no readable {CONFIG_FILE}"
        raise AdapterError(
            f"adapter '{path}' {what}; give a PEFT LoRA folder, an mlx_lm adapter folder or a GGUF LoRA file"
        )
    return readers[kind]()


def export_adapter(path: Path, base: BaseSpec, output: Path, bits: Bits = 4) -> ExportedAdapter:
    """Write an adapter as one quantised file.

    Args:
        path: a PEFT LoRA folder, an mlx_lm adapter folder, or a GGUF LoRA file.
        base: the exported base that the adapter is for.
        output: the .safetensors file to write.

    Raises:
        UnsupportedAdapter: it holds, or asks for, something that slots cannot carry.
        SlotMismatch: made for another base; lists every slot that does not fit.
        AdapterError: unreadable, incomplete, or with values that are not finite.
        ExportError: `output` exists.
    """
    if output.exists():
        raise ExportError(f"'{output}' exists; remove it or give another file")
    read, groups = read_source(path, base), {g.name: g for g in base.slots}
    pairs = _split_packed(read.pairs, groups)
    _check_slots(read.name, pairs, groups)
    modules, errors = {}, {}
    for group in base.slots:
        layers = pairs.get(group.name)
        if layers:
            modules[group.name], errors[group.name] = _quantize_group(layers, group, bits)
    rounded = {name: round(error, 5) for name, error in errors.items()}
    source = {**read.about, "errors": rounded, **_training_report(path)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(adapter_to_bytes(modules, bits=bits, base=base.identity, source=source))
    rank = max(m.rank for m in modules.values())
    mean = float(np.mean(list(errors.values())))
    return ExportedAdapter(AdapterSpec(output.name, rank, bits, base.identity, round(mean, 5), source), errors)


def _split_packed(pairs: Pairs, groups: Mapping[str, SlotGroup]) -> Pairs:
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
            result[part] = {i: LoraPair(p.a, p.b[start:end], p.scale) for i, p in layers.items()}
            start = end
    return result


def _check_slots(adapter: str, pairs: Pairs, groups: Mapping[str, SlotGroup]) -> None:
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


def _quantize_group(layers: Mapping[int, LoraPair], group: SlotGroup, bits: Bits) -> tuple[AdapterModule, float]:
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
