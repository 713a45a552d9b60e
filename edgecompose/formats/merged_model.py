"""Writes a blend into the weights of its float base, as a model that every program can load."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.atomic import new_folder
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.merged import MergedAdapter, require_adapters
from edgecompose.errors import CheckpointError, MergeError
from edgecompose.formats.architectures import MODULE_AT, PACKED
from edgecompose.formats.checkpoint import (
    BASE_KEY,
    INDEX_FILE,
    FloatCheckpoint,
    StoredTensor,
    from_float32,
    to_float32,
    write_shard,
)

Float = npt.NDArray[np.float32]
Advance = Callable[[int], None]
_WEIGHT = re.compile(r"^((?:.*\.)?)layers\.(\d+)\.(\w+\.\w+)\.weight$")
#: Parts of multimodal models that have layers of the same names.
_OTHER_TOWER = re.compile(r"vision|visual|audio")
#: Files beside weights that a model is not complete without, by the end of their names.
_COPIED = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
_LICENCES = ("LICENSE", "NOTICE")


@dataclass(frozen=True, slots=True, eq=False)
class RowUpdate:
    """What rows `start` .. of a weight get: b.T @ a, from a (R, n_in) and b (R, rows)."""

    start: int
    a: Float
    b: Float


def write_merged_model(
    merged: MergedAdapter,
    checkpoint: FloatCheckpoint,
    output: Path,
    base: BaseSpec,
    advance: Advance = lambda count: None,
) -> list[Path]:
    """Write a Hugging Face folder of the same files and types, its linear modules being W + ΔW, computed in float32.

    One tensor at a time is in memory. The folder appears when it is complete.

    Args:
        checkpoint: the float weights that the base was exported from.
        base: says which base that is, and how wide the parts of packed projections are.
        advance: called with the bytes that were hashed (unless the base is recorded) and read, as they are.

    Raises:
        MergeError: the blend holds no adapter, `output` exists, or a type of numbers cannot hold the result.
        CheckpointError: of another base, or without a module that the blend changes.
        OSError: something cannot be read or written.
    """
    require_adapters(merged)
    with new_folder(output) as work:
        if output.exists():
            raise MergeError(f"'{output}' exists; give another folder")
        checkpoint.check_base(base.identity, advance=advance)
        changes = _changes(checkpoint, row_updates(merged, base), weight_shapes(base))
        for shard in checkpoint.shards:
            metadata = {key: value for key, value in shard.metadata.items() if key != BASE_KEY}
            write_shard(shard, work / shard.path.name, metadata, changes, advance=advance)
        for path in sorted(checkpoint.folder.iterdir()):
            if path.is_file() and _goes_along(path.name, len(checkpoint.shards)):
                shutil.copyfile(path, work / path.name)
        names = sorted(path.name for path in work.iterdir())
    return [output / name for name in names]


def weight_shapes(base: BaseSpec) -> dict[str, tuple[int, int]]:
    """Shape (n_out, n_in) of the weight of each linear module, packed ones too."""
    shapes = {group.name: (group.n_out, group.n_in) for group in base.slots}
    for packed, parts in PACKED.items():
        if all(part in shapes for part in parts):
            shapes[packed] = (sum(shapes[part][0] for part in parts), shapes[parts[0]][1])
    return shapes


def row_updates(merged: MergedAdapter, base: BaseSpec) -> dict[tuple[int, str], list[RowUpdate]]:
    """Updates by layer and linear module, those of parts also under the name of what packs them.

    Layers that the blend leaves alone are left out.
    """
    shapes = weight_shapes(base)
    places = {group.name: [(group.name, 0)] for group in base.slots}
    for packed in shapes.keys() & PACKED.keys():
        start = 0
        for part in PACKED[packed]:
            places[part].append((packed, start))
            start += shapes[part][0]
    updates: dict[tuple[int, str], list[RowUpdate]] = {}
    for module, (a, b) in merged.factors().items():
        for layer in range(len(a)):
            if a[layer].any() and b[layer].any():
                for name, start in places[module]:
                    updates.setdefault((layer, name), []).append(RowUpdate(start, a[layer], b[layer]))
    return updates


def _goes_along(name: str, shards: int) -> bool:
    """Whether a file beside the weights belongs to the merged model: not indexes of other weights, not adapters."""
    if name == INDEX_FILE:
        return shards > 1
    if name.startswith("adapter_") or name.endswith(".bin.index.json"):
        return False
    return name.endswith(_COPIED) or name.split(".")[0] in _LICENCES


def _changes(
    checkpoint: FloatCheckpoint,
    updates: Mapping[tuple[int, str], Sequence[RowUpdate]],
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, Callable[[bytes], bytes]]:
    """How each weight changes, by the tensor's name; every update must find its weight, once."""
    changes: dict[str, Callable[[bytes], bytes]] = {}
    missing = {key for key in updates if key[1] not in PACKED}
    wrong = f"give the float base that the bundle's base was exported from, not '{checkpoint.folder}'"
    for tensor in (tensor for shard in checkpoint.shards for tensor in shard.tensors):
        key = _place(tensor.name)
        if key is None or key not in updates:
            continue
        layer, module = key
        if tensor.shape != shapes[module]:
            raise CheckpointError(f"'{tensor.name}' is of shape {tensor.shape}, expected {shapes[module]}; {wrong}")
        own = {(layer, part) for part in PACKED.get(module, (module,))} & set(updates)
        if not own <= missing:
            raise CheckpointError(
                f"checkpoint '{checkpoint.folder}' has more than one '{module}' in layer {layer} ('{tensor.name}' is "
                "one); only one decoder can be merged into"
            )
        missing -= own
        changes[tensor.name] = partial(_merge, tensor, updates[key])
    if missing:
        names = [f"layers.{layer}.{module}" for layer, module in sorted(missing)]
        shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        raise CheckpointError(f"the blend changes weights that the checkpoint lacks: {shown}; {wrong}")
    return changes


def _place(tensor: str) -> tuple[int, str] | None:
    """Layer and linear module, or what packs several, of a weight of the text decoder."""
    match = _WEIGHT.match(tensor)
    if match is None or _OTHER_TOWER.search(match[1]) or match[3] not in MODULE_AT:
        return None
    return int(match[2]), MODULE_AT[match[3]]


def _merge(tensor: StoredTensor, updates: Sequence[RowUpdate], content: bytes) -> bytes:
    """The bytes of W + ΔW from those of W."""
    weight = to_float32(content, tensor.dtype).reshape(tensor.shape)
    for update in updates:
        weight[update.start : update.start + update.b.shape[1]] += update.b.T @ update.a
    result = from_float32(weight, tensor.dtype)
    if not np.isfinite(to_float32(result, tensor.dtype)).all():
        raise MergeError(
            f"'{tensor.name}' has values after merging that {tensor.dtype} cannot hold; give a float32 checkpoint, "
            "or --norm-guard"
        )
    return result
