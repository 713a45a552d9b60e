"""A LoRA file of llama.cpp (GGUF) to float factors, scaled as llama.cpp scales them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

from edgecompose.bundle import sha256_of
from edgecompose.errors import AdapterError, SlotMismatch, UnsupportedAdapter
from edgecompose.gguf_lora import INTERLEAVED, MODULE_NAMES, halved
from edgecompose.manifest import BaseSpec
from edgecompose_export.lora_source import Float, Half, LoraSource, Side, pair_up, refuse_unknown

_MAGIC = b"GGUF"
_TENSOR = re.compile(r"^(blk\.(\d+)\.(\w+))\.weight\.lora_(a|b)$")
_TYPES = ("F32", "F16", "BF16", "Q8_0")


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """A reader that stops where the file ends, however long a damaged file says that something is."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, *args: Any, **options: Any) -> npt.NDArray[Any]:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, where more is wanted")
        return cast(npt.NDArray[Any], super()._get(offset, dtype, count, *args, **options))


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do.

    Raises:
        AdapterError: it does not, though it is called .gguf.
    """
    with path.open("rb") as stream:
        found = stream.read(len(_MAGIC))
    if found != _MAGIC and path.suffix == ".gguf":
        raise AdapterError(f"adapter '{path}' begins with {found!r}, not with {_MAGIC!r}; it is no GGUF file")
    return found == _MAGIC


def read_gguf_lora(path: Path, base: BaseSpec) -> LoraSource:
    """The factors of a LoRA file, B's rows of q and k in the order of transformers.

    A module's scale is alpha / rank, or 1 where alpha is 0 or absent, as in llama.cpp.

    Args:
        base: says the architecture, where it is known, and the size of a head.

    Raises:
        UnsupportedAdapter: no LoRA, an aLoRA, tensors or an architecture without slots, another type of numbers.
        SlotMismatch: for a base of another architecture or size of heads.
        AdapterError: unreadable or incomplete.
    """
    name = path.stem
    try:
        reader = _Reader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        swapped = reader.byte_order == "S"
    except (OSError, ValueError, KeyError, IndexError, OverflowError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"adapter '{name}': '{path}' cannot be read as GGUF: {error or type(error).__name__}"
        ) from error
    if swapped:
        raise UnsupportedAdapter(f"adapter '{name}' is of the other byte order; convert it on this kind of machine")
    architecture, alpha = _check_fields(name, fields, base)
    modules = {name: module for module, name in MODULE_NAMES[architecture].items()}
    found = [(tensor, _TENSOR.match(tensor.name)) for tensor in reader.tensors]
    refuse_unknown(name, (t.name for t, match in found if match is None or match[3] not in modules))
    halves = []
    for tensor, match in found:
        assert match is not None  # unknown names were refused above
        module, side = modules[match[3]], cast(Side, match[4].upper())
        values = _values(name, tensor)
        if side == "B" and module in ("q_proj", "k_proj") and architecture in INTERLEAVED:
            values = _in_halves(name, match[1], values, base)
        halves.append(Half(match[1], module, int(match[2]), side, values))
    about = {"name": name, "kind": "gguf", "weights_sha256": sha256_of(path), "lora_alpha": alpha}
    return LoraSource(name, "gguf", pair_up(name, halves, lambda _, rank: alpha / rank if alpha else 1.0), about)


def _check_fields(adapter: str, fields: Mapping[str, Any], base: BaseSpec) -> tuple[str, float]:
    """Architecture and alpha."""
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if fields.get(key) != wanted:
            raise UnsupportedAdapter(f"adapter '{adapter}' has {key} {fields.get(key)!r:.60}; {wanted!r} is wanted")
    activated = sorted(key for key in fields if key.startswith("adapter.alora."))
    if activated:
        raise UnsupportedAdapter(f"adapter '{adapter}' is an aLoRA ({', '.join(activated)}), which cannot be composed")
    architecture, alpha = fields.get("general.architecture"), fields.get("adapter.lora.alpha", 0.0)
    if not isinstance(architecture, str) or architecture not in MODULE_NAMES:
        raise UnsupportedAdapter(
            f"adapter '{adapter}' is for the architecture {architecture!r:.60}; "
            f"{', '.join(MODULE_NAMES)} can be read from GGUF"
        )
    if base.architecture not in (None, architecture):
        raise SlotMismatch(
            f"adapter '{adapter}' is for the architecture {architecture}, this base is {base.architecture}; "
            "export it against its own base"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise AdapterError(f"adapter '{adapter}': adapter.lora.alpha is {alpha!r:.60}; a number is wanted")
    return architecture, float(alpha)


def _values(adapter: str, tensor: Any) -> Float:
    """A tensor as float32: lora_a (r, in), lora_b (out, r)."""
    if tensor.tensor_type.name not in _TYPES:
        raise UnsupportedAdapter(
            f"adapter '{adapter}': '{tensor.name}' is of type {tensor.tensor_type.name}; "
            f"{', '.join(_TYPES)} can be read; convert it again with --outtype f32"
        )
    return np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)


def _in_halves(adapter: str, place: str, rows: Float, base: BaseSpec) -> Float:
    if rows.ndim != 2 or len(rows) % base.head_size:
        raise SlotMismatch(
            f"adapter '{adapter}': '{place}' has lora_b of shape {rows.shape}, which is no whole number of heads of "
            f"{base.head_size}; export it against its own base"
        )
    return halved(rows, len(rows) // base.head_size)
