"""LoRA files of llama.cpp (GGUF): reads them to float factors, and writes a blend as one."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.atomic import new_file
from edgecompose.bundle.files import sha256_of
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.merged import MergedAdapter, require_adapters
from edgecompose.errors import AdapterError, ExportError, MergeError, SlotMismatch, UnsupportedAdapter
from edgecompose.formats.architectures import ARCHITECTURES, Architecture, architecture_of, gguf_architectures
from edgecompose.formats.gguf_file import MAGIC, VERSIONS, GgufFile, GgufTensor, read_gguf, require_gguf
from edgecompose.formats.lora import (
    Half,
    LoraSource,
    Side,
    check_name,
    check_scale,
    model_factors,
    pair_up,
    refuse_unknown,
)

Float = npt.NDArray[np.float32]
_TENSOR = re.compile(r"^(blk\.(\d+)\.(\w+))\.weight\.lora_(a|b)$")
_TYPES = ("F32", "F16", "BF16", "Q8_0")


def is_gguf_lora(path: Path) -> bool:
    """Whether a file begins as GGUF files do.

    Raises:
        AdapterError: it does not, though it is called .gguf.
    """
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(len(MAGIC))
    if start != MAGIC and path.suffix == ".gguf":
        raise AdapterError(f"adapter '{path}' begins with {start!r}, not with {MAGIC!r}; it is no GGUF file")
    return start == MAGIC


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
    if _is_swapped(path):
        raise UnsupportedAdapter(f"adapter '{name}' is of the other byte order; convert it on this kind of machine")
    try:
        file = read_gguf(path)
    except ExportError as error:
        raise AdapterError(f"adapter '{name}': '{path}' cannot be read as GGUF: {error}") from error
    row, alpha = _check_fields(name, file.metadata, base)
    modules = {place: module for module, place in row.gguf_paths.items()}
    halves, unknown = [], []
    for tensor in file.tensors.values():
        check_name(name, tensor.name)
        match = _TENSOR.match(tensor.name)
        if match is None or match[3] not in modules:
            unknown.append(tensor.name)
            continue
        module, side = modules[match[3]], cast(Side, match[4].upper())
        values = _values(name, file, tensor)
        if side == "B" and row.interleaved and module in ("q_proj", "k_proj"):
            values = _in_halves(name, match[1], values, base)
        halves.append(Half(match[1], module, int(match[2]), side, values))
    refuse_unknown(name, unknown)
    about = {"name": name, "kind": "gguf", "weights_sha256": sha256_of(path), "lora_alpha": alpha}
    return LoraSource(name, pair_up(name, halves, lambda _, rank: alpha / rank if alpha else 1.0), about)


def write_gguf_lora(merged: MergedAdapter, path: Path, base: BaseSpec) -> Path:
    """Write a GGUF file that `--lora` of llama.cpp takes with the same base.

    llama.cpp scales a module by alpha / rank; alpha is 1 and B carries the rank, so that the scale is 1 at any rank.

    Raises:
        MergeError: the blend holds no adapter, the file exists, or there are no GGUF files of the base's architecture.
        BundleError: the base's architecture is not known.
        EdgeComposeError: the package gguf is not installed.
        OSError: the file cannot be written.
    """
    require_gguf()
    from gguf import GGUFWriter

    require_adapters(merged)
    row = _row(base)
    with new_file(path) as work:
        if path.exists():
            raise MergeError(f"'{path}' exists; give another file")
        writer = GGUFWriter(work, row.gguf)
        try:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", 1.0)
            for name, values in gguf_tensors(merged, base):
                writer.add_tensor(name, values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        _check_whole(work)
    return path


def _check_whole(path: Path) -> None:
    """Make sure that a file has all its bytes: NumPy says nothing where the disk was full.

    Raises:
        OSError: it ends too early.
    """
    from gguf.constants import GGUF_DEFAULT_ALIGNMENT

    try:
        read_gguf(path)
    except ExportError as error:
        raise OSError(errno.ENOSPC, "cannot be written as a whole", str(path)) from error
    if path.stat().st_size % GGUF_DEFAULT_ALIGNMENT:
        raise OSError(errno.ENOSPC, "cannot be written as a whole", str(path))


def gguf_tensors(merged: MergedAdapter, base: BaseSpec) -> Iterator[tuple[str, Float]]:
    """Name and values of each tensor: `lora_a` (R, n_in), `lora_b` (n_out, R)."""
    row = architecture_of(base.architecture)
    for module, (a, b) in model_factors(merged.factors(), base, row.gguf_paths).items():
        rank = a.shape[1]
        for layer in range(len(a)):
            rows = np.asarray(b[layer].T * rank, np.float32)
            if row.interleaved and module in ("q_proj", "k_proj"):
                rows = interleaved(rows, len(rows) // base.head_size)
            place = f"blk.{layer}.{row.gguf_paths[module]}.weight"
            yield f"{place}.lora_a", np.ascontiguousarray(a[layer])
            yield f"{place}.lora_b", np.ascontiguousarray(rows)


def interleaved(rows: Float, heads: int) -> Float:
    """Rows (heads x size, n) of q or k with the two halves of each head taking turns, as rotation pairs them there."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def halved(rows: Float, heads: int) -> Float:
    """The inverse of `interleaved`."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _is_swapped(path: Path) -> bool:
    """Whether the numbers of a GGUF file are big-endian."""
    with path.open("rb") as stream:
        version = stream.read(len(MAGIC) + 4)[len(MAGIC) :]
    return int.from_bytes(version, "big") in VERSIONS and int.from_bytes(version, "little") not in VERSIONS


def _check_fields(adapter: str, fields: Mapping[str, Any], base: BaseSpec) -> tuple[Architecture, float]:
    """Architecture and alpha."""
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if fields.get(key) != expected:
            raise UnsupportedAdapter(f"adapter '{adapter}' has {key} {fields.get(key)!r:.60}, expected {expected!r}")
    activated = sorted(key for key in fields if key.startswith("adapter.alora."))
    if activated:
        raise UnsupportedAdapter(f"adapter '{adapter}' is an aLoRA ({activated[0]:.60}), which cannot be composed")
    architecture, alpha = fields.get("general.architecture"), fields.get("adapter.lora.alpha", 0.0)
    rows = gguf_architectures()
    if not isinstance(architecture, str) or architecture not in rows:
        raise UnsupportedAdapter(
            f"adapter '{adapter}' is for the architecture {architecture!r:.60}; {', '.join(rows)} can be read from GGUF"
        )
    row = rows[architecture] if base.architecture is None else architecture_of(base.architecture)
    if row.gguf != architecture:  # that of a Mistral is llama
        other = "has none in GGUF files" if row.gguf is None else f"expected {row.gguf}"
        raise SlotMismatch(
            f"adapter '{adapter}' is for the architecture {architecture}, this base is {row.name} ({other}); "
            "export it against its own base"
        )
    check_scale(adapter, "adapter.lora.alpha", alpha)
    return row, float(alpha)


def _values(adapter: str, file: GgufFile, tensor: GgufTensor) -> Float:
    """A tensor as float32: lora_a (r, in), lora_b (out, r)."""
    if tensor.type not in _TYPES:
        raise UnsupportedAdapter(
            f"adapter '{adapter}': '{tensor.name}' is of type {tensor.type}; "
            f"{', '.join(_TYPES)} can be read; convert it again with --outtype f32"
        )
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    values = dequantize(file.data(tensor.name), GGMLQuantizationType[tensor.type])
    return np.array(values, np.float32).reshape(tensor.shape)


def _in_halves(adapter: str, place: str, rows: Float, base: BaseSpec) -> Float:
    if rows.ndim != 2 or len(rows) % base.head_size:
        raise SlotMismatch(
            f"adapter '{adapter}': '{place}' has lora_b of shape {rows.shape}, which is no whole number of heads of "
            f"{base.head_size}; export it against its own base"
        )
    return halved(rows, len(rows) // base.head_size)


def _row(base: BaseSpec) -> Architecture:
    row = architecture_of(base.architecture)
    if base.architecture is None or row.gguf is None:
        reason = "is not known; export it again" if base.architecture is None else f"is {row.name}"
        known = ", ".join(row.name for row in ARCHITECTURES.values() if row.gguf is not None)
        raise MergeError(f"the base's architecture {reason}; {known} can be written as GGUF; use --format peft")
    return row
