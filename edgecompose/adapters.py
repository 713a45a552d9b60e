"""An adapter of any format to quantised factors in the slots of a base, as one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.adapter import AdapterModule, adapter_to_bytes
from edgecompose.bundle.atomic import new_file
from edgecompose.bundle.quantization import Bits, quantize, relative_error
from edgecompose.bundle.records import read_json
from edgecompose.bundle.specs import AdapterSpec, BaseSpec, SlotGroup
from edgecompose.errors import ExportError, SlotMismatch
from edgecompose.formats.lora import LoraPair, Pairs, split_packed
from edgecompose.formats.registry import read_adapter
from edgecompose.merging.sparsify import thresholds

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ConvertedAdapter:
    """The manifest's entry of an adapter that was written, and the relative error of each module's factors."""

    spec: AdapterSpec
    errors: Mapping[str, float]


def convert_adapter(path: Path, base: BaseSpec, output: Path, bits: Bits = 4) -> ConvertedAdapter:
    """Write an adapter as one quantised file.

    Args:
        path: a file or folder in a format of `edgecompose.formats.registry`.
        base: the exported base that the adapter is for.
        output: the .safetensors file to write.

    Raises:
        UnsupportedAdapter: it holds, or asks for, something that slots cannot carry.
        SlotMismatch: made for another base; lists every slot that does not fit.
        AdapterError: unreadable, incomplete, or with values that are not finite.
        ExportError: `output` exists.
        InUse: another process is writing it.
        OSError: it cannot be written.
    """
    with new_file(output) as work:
        if output.exists():
            raise ExportError(f"'{output}' exists; remove it or give another file")
        content, converted = _convert(path, base, bits)
        work.write_bytes(content)
    return replace(converted, spec=replace(converted.spec, file=output.name))


def _convert(path: Path, base: BaseSpec, bits: Bits) -> tuple[bytes, ConvertedAdapter]:
    """The quantised file of an adapter, and what it is."""
    source, groups = read_adapter(path, base), {group.name: group for group in base.slots}
    pairs = split_packed(source.pairs, groups)
    _check_slots(source.name, pairs, groups)
    modules, errors = {}, {}
    for group in base.slots:
        layers = pairs.get(group.name)
        if layers:
            modules[group.name], errors[group.name] = _quantize_group(layers, group, bits)
    rounded = {name: round(error, 5) for name, error in errors.items()}
    about = {**source.about, "errors": rounded, **_training_report(path)}
    content = adapter_to_bytes(modules, bits=bits, base=base.identity, source=about)
    spec = AdapterSpec(
        file="",
        rank=max(module.rank for module in modules.values()),
        bits=bits,
        base=base.identity,
        error=round(float(np.mean(list(errors.values()))), 5),
        source=about,
    )
    return content, ConvertedAdapter(spec, errors)


def _check_slots(adapter: str, pairs: Pairs, groups: Mapping[str, SlotGroup]) -> None:
    problems = []
    for module, layers in sorted(pairs.items()):
        group = groups.get(module)
        if group is None:
            problems.append(f"'{module}' has no slot in this base")
            continue
        for layer, pair in sorted(layers.items()):
            shape = (pair.a.shape[1], pair.b.shape[0])
            if layer >= group.layers:
                problems.append(f"'layers.{layer}.{module}': this base has {group.layers} layers")
            elif shape != (group.n_in, group.n_out):
                problems.append(
                    f"'layers.{layer}.{module}' is {group.n_in}x{group.n_out} in this base, "
                    f"{shape[0]}x{shape[1]} in the adapter"
                )
    if problems:
        raise SlotMismatch(
            f"adapter '{adapter}' does not fit this base: {'; '.join(problems)}; use the base that it is for"
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
    return AdapterModule(*quantized, scaling=scaling, ranks=ranks, thresholds=limits), error


def _training_report(folder: Path) -> dict[str, Any]:
    path = folder / "training.json"
    return {"training": read_json(path, ExportError, "remove it, or train again")} if path.is_file() else {}
