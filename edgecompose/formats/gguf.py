"""A blend as a LoRA file of llama.cpp, for every program that runs GGUF models."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.merged import MergedAdapter, require_adapters
from edgecompose.errors import EdgeComposeError, MergeError
from edgecompose.formats.architectures import ARCHITECTURES, Architecture, architecture_of
from edgecompose.formats.packing import model_factors

Float = npt.NDArray[np.float32]


def write_gguf_lora(merged: MergedAdapter, path: Path, base: BaseSpec) -> Path:
    """Write a GGUF file that `--lora` of llama.cpp takes with the same base.

    llama.cpp scales a module by alpha / rank; alpha is 1 and B carries the rank, so that the scale is 1 at any rank.

    Raises:
        MergeError: the blend holds no adapter, the file exists, or there are no GGUF files of the base's architecture.
        BundleError: the base's architecture is not known.
        EdgeComposeError: the package gguf is not installed.
        OSError: the file cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise EdgeComposeError("writing GGUF needs the package gguf; run: pip install 'edgecompose[gguf]'")
    from gguf import GGUFWriter

    require_adapters(merged)
    row = _row(base)
    if path.exists():
        raise MergeError(f"'{path}' exists; give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, row.gguf)
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
    return path


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


def _row(base: BaseSpec) -> Architecture:
    row = architecture_of(base.architecture)
    if base.architecture is None or row.gguf is None:
        reason = "is not known; export it again" if base.architecture is None else f"is {row.name}"
        known = ", ".join(row.name for row in ARCHITECTURES.values() if row.gguf is not None)
        raise MergeError(f"the base's architecture {reason}; {known} can be written as GGUF; use --format peft")
    return row


def interleaved(rows: Float, heads: int) -> Float:
    """Rows (heads x size, n) of q or k with the two halves of each head taking turns, as rotation pairs them there."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def halved(rows: Float, heads: int) -> Float:
    """The inverse of `interleaved`."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
