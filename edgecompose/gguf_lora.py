"""A blend as a LoRA file of llama.cpp, for every program that runs GGUF models."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecompose.blend import MergedAdapter, require_adapters
from edgecompose.decoder_modules import model_factors
from edgecompose.errors import EdgeComposeError, MergeError
from edgecompose.manifest import BaseSpec

Float = npt.NDArray[np.float32]
_SEPARATE = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
_PACKED = {"qkv_proj": "attn_qkv", "o_proj": "attn_output", "gate_up_proj": "ffn_up", "down_proj": "ffn_down"}
#: Architecture -> what its GGUF files call the weight of each module.
MODULE_NAMES = {"llama": _SEPARATE, "phi3": _PACKED, "qwen2": _SEPARATE, "qwen3": _SEPARATE}
#: Architectures whose GGUF files hold the rows of q and k in llama.cpp's order of rotary halves.
INTERLEAVED = frozenset({"llama"})


def write_gguf_lora(merged: MergedAdapter, path: Path, base: BaseSpec) -> Path:
    """Write a GGUF file that `--lora` of llama.cpp takes with the same base.

    llama.cpp scales a module by alpha / rank; alpha is 1 and B carries the rank, so that the scale is 1 at any rank.

    Raises:
        MergeError: the blend holds no adapter, the file exists, or how GGUF files of the base lay weights out is not
            known here.
        EdgeComposeError: the package gguf is not installed.
        OSError: the file cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise EdgeComposeError("writing GGUF needs the package gguf; run: pip install 'edgecompose[gguf]'")
    from gguf import GGUFWriter

    require_adapters(merged)
    if base.architecture not in MODULE_NAMES:
        raise MergeError(
            f"the base's architecture is {base.architecture or 'not known'}; {', '.join(MODULE_NAMES)} can be "
            "written as GGUF; export the base again if the bundle is older than this, or use --format peft"
        )
    if path.exists():
        raise MergeError(f"'{path}' exists; give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, base.architecture)
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
    names = MODULE_NAMES[base.architecture or ""]
    for module, (a, b) in model_factors(merged.factors(), base).items():
        rank = a.shape[1]
        for layer in range(len(a)):
            rows = np.asarray(b[layer].T * rank, np.float32)
            if module in ("q_proj", "k_proj") and base.architecture in INTERLEAVED:
                rows = interleaved(rows, len(rows) // base.head_size)
            place = f"blk.{layer}.{names[module]}.weight"
            yield f"{place}.lora_a", np.ascontiguousarray(a[layer])
            yield f"{place}.lora_b", np.ascontiguousarray(rows)


def interleaved(rows: Float, heads: int) -> Float:
    """Rows (heads x size, n) of q or k with the two halves of each head taking turns, as rotation pairs them there."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def halved(rows: Float, heads: int) -> Float:
    """The inverse of `interleaved`."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
