"""The block types of GGUF as blocks, without loss: codes, scales and offsets are those of the file.

Layouts of the types: ggml's `ggml-quants` and the package gguf, whose dequantised values the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgecompose.errors import ExportError
from edgecompose_export.weights.blocks import BlockForm, Blocks, Bytes, Float

FLOAT_TYPES = ("F32", "F16", "BF16")
#: GGUF block type -> form.
GGUF_FORMS: Mapping[str, BlockForm] = {
    "Q8_0": BlockForm(8, 32),
    "Q4_0": BlockForm(4, 32),
    "Q4_1": BlockForm(4, 32, offsets=True),
    "Q5_0": BlockForm(8, 32),
    "Q5_1": BlockForm(8, 32, offsets=True),
    "Q2_K": BlockForm(4, 16, offsets=True),
    "Q3_K": BlockForm(4, 16),
    "Q4_K": BlockForm(4, 32, offsets=True),
    "Q5_K": BlockForm(8, 32, offsets=True),
    "Q6_K": BlockForm(8, 16),
    "IQ4_NL": BlockForm(8, 32),
    "IQ4_XS": BlockForm(8, 32),
}
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)


def read_blocks(raw: Bytes, kind: str) -> Blocks:
    """Rows of a GGUF tensor as blocks.

    Args:
        raw: (N, bytes of a row) uint8.
        kind: one of GGUF_FORMS.

    Raises:
        ExportError: the type has no form, or a scale is not a finite number.
    """
    if kind not in GGUF_FORMS:
        raise ExportError(f"weights have the type {kind}, expected one of {', '.join((*FLOAT_TYPES, *GGUF_FORMS))}")
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    rows = len(raw)
    with np.errstate(invalid="ignore", over="ignore"):  # the check below refuses damaged scales
        blocks = _READERS[kind](np.ascontiguousarray(raw).reshape(-1, size))
    form = GGUF_FORMS[kind]
    codes = blocks.codes.reshape(rows, -1, form.block)
    offsets = None if blocks.offsets is None else blocks.offsets.reshape(rows, -1)
    shaped = Blocks(form.bits, codes, blocks.scales.reshape(rows, -1), offsets=offsets)
    if not np.isfinite(shaped.scales).all() or (offsets is not None and not np.isfinite(offsets).all()):
        raise ExportError("a scale is not a finite number; the file is damaged, copy it again")
    return shaped


def _codes(values: npt.NDArray[Any]) -> Bytes:
    return np.asarray(values, np.uint8)


def _half(raw: Bytes) -> Float:
    """Little-endian float16 pairs of bytes (n, 2) as float32 (n, 1)."""
    with np.errstate(invalid="ignore"):
        return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: Bytes) -> Bytes:
    """Bytes (..., n) to codes (..., 2 n): all low nibbles, then all high ones."""
    return np.concatenate([raw & 15, raw >> 4], -1)


def _fifth_bits(raw: Bytes) -> Bytes:
    """Bits (n, 32) of 4 bytes, lowest first."""
    return np.unpackbits(raw, axis=1, bitorder="little")


def _q8_0(b: Bytes) -> Blocks:
    return Blocks(8, _codes(b[:, 2:] ^ 128), _half(b[:, :2]))


def _q4_0(b: Bytes) -> Blocks:
    return Blocks(4, _nibbles(b[:, 2:]), _half(b[:, :2]))


def _q4_1(b: Bytes) -> Blocks:
    d, m = _half(b[:, :2]), _half(b[:, 2:4])
    return Blocks(4, _nibbles(b[:, 4:]), d, offsets=m + 8 * d)


def _q5_0(b: Bytes) -> Blocks:
    return Blocks(8, _codes((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]) << 4) + 112), _half(b[:, :2]))


def _q5_1(b: Bytes) -> Blocks:
    d, m = _half(b[:, :2]), _half(b[:, 2:4])
    return Blocks(8, _codes((_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]) << 4) + 112), d, offsets=m + 16 * d)


def _scales_and_minima(b: Bytes) -> tuple[Bytes, Bytes]:
    """Eight scales and eight minima of 6 bits each, out of 12 bytes (n, 12)."""
    first, second, third = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], 1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], 1)
    return scales, minima


def _k_scales(b: Bytes) -> tuple[Float, Float]:
    scales, minima = _scales_and_minima(b[:, 4:16])
    return _half(b[:, :2]) * scales, -(_half(b[:, 2:4]) * minima)


def _q4_k(b: Bytes) -> Blocks:
    d, m = _k_scales(b)
    return Blocks(4, _nibbles(b[:, 16:].reshape(-1, 4, 32)), d, offsets=m + 8 * d)


def _q5_k(b: Bytes) -> Blocks:
    d, m = _k_scales(b)
    low = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return Blocks(8, _codes((low | high << 4) + 112), d, offsets=m + 16 * d)


def _q6_k(b: Bytes) -> Blocks:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape((-1, 2, 4, 32))
    high = (b[:, 128:192].reshape((-1, 2, 1, 32)) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    scales = _half(b[:, 208:]) * b[:, 192:208].view(np.int8)
    return Blocks(8, _codes((low | high << 4) + 96), scales)


def _q3_k(b: Bytes) -> Blocks:
    raw = b[:, 96:108]
    low = np.concatenate([raw[:, :8] & 15, raw[:, :8] >> 4], 1)
    high = (raw[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(-1, 16)
    scales = _half(b[:, 108:]) * ((low | high << 4).astype(np.int8) - 32)
    two = (b[:, 32:96].reshape((-1, 2, 1, 32)) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    third = (b[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return Blocks(4, _codes(two.reshape(-1, 8, 32) + 4 * third + 4), scales)


def _q2_k(b: Bytes) -> Blocks:
    d = _half(b[:, 80:82]) * (b[:, :16] & 15)
    m = -(_half(b[:, 82:84]) * (b[:, :16] >> 4))
    two = (b[:, 16:80].reshape((-1, 2, 1, 32)) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    return Blocks(4, _codes(two + 7), d, offsets=m + d)


def _iq4_nl(b: Bytes) -> Blocks:
    return Blocks(8, (_IQ4 + 128).astype(np.uint8)[_nibbles(b[:, 2:])], _half(b[:, :2]))


def _iq4_xs(b: Bytes) -> Blocks:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], -1).reshape(-1, 8)
    scales = _half(b[:, :2]) * ((low | high << 4).astype(np.int16) - 32)
    return Blocks(8, (_IQ4 + 128).astype(np.uint8)[_nibbles(b[:, 8:].reshape(-1, 8, 16))], scales.astype(np.float32))


_READERS: Mapping[str, Callable[[Bytes], Blocks]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
