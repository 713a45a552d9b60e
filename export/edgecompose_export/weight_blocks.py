"""Linear weights in blocks of 4 or 8 bits, in the forms that ONNX Runtime's MatMulNBits has fast kernels for.

A row is cut into blocks of 16 or more weights along the input axis, w = s (q - z) + c, where z is 8 for 4 bits and 128
for 8 bits unless blocks have zero points of their own. The kernel has int8 activations (accuracy level 4) and computes
the first term; the second is blocksums(x) @ C. So x is extended by copies of its sums over blocks, and each row by what
C is in the same bits and, behind it, by what those leave of C in the same bits again.

Every block type of GGUF has one of these forms, without loss: the codes, scales and offsets are the file's own.
Layouts of the types: ggml's `ggml-quants` and the package gguf, whose dequantised values the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgecompose.errors import ExportError

Float = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockForm:
    """Bits of a code (4 or 8), weights of a block, and whether blocks have an offset, or a zero point of their own."""

    bits: int
    block: int
    offsets: bool = False
    zeros: bool = False

    def copies(self, width: int) -> int:
        """How many copies of its block sums follow an input of `width` values."""
        if not self.offsets:
            return 0
        count = -(-width // self.block)
        start = -(-count // self.block) * self.block
        return -(-(start + count) // count)

    def extended(self, width: int) -> int:
        """Width of an input with the copies that follow it."""
        count = -(-width // self.block)
        return count * self.block + self.copies(width) * count if self.offsets else width

    def blocks(self, width: int) -> int:
        """Blocks of a stored row for an input of `width` values."""
        return -(-self.extended(width) // self.block)


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Rows of a weight: codes (N, blocks, block) uint8, scales (N, blocks) float32, offsets c likewise or None.

    `zeros` (N, blocks) uint8 are zero points z, where they are not the middle code.
    """

    bits: int
    codes: Bytes
    scales: Float
    offsets: Float | None = None
    zeros: Bytes | None = None

    @property
    def form(self) -> BlockForm:
        """The form that they have."""
        return BlockForm(self.bits, self.codes.shape[2], self.offsets is not None, self.zeros is not None)

    def __getitem__(self, rows: slice) -> Blocks:
        """Some of the rows."""
        offsets = None if self.offsets is None else self.offsets[rows]
        zeros = None if self.zeros is None else self.zeros[rows]
        return Blocks(self.bits, self.codes[rows], self.scales[rows], offsets, zeros)

    def values(self, width: int) -> Float:
        """The weights that they stand for, (N, width) float32."""
        zero = np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[..., None].astype(np.float32)
        rows = (self.codes.astype(np.float32) - zero) * self.scales[..., None]
        if self.offsets is not None:
            rows += self.offsets[..., None]
        return np.ascontiguousarray(rows.reshape(len(rows), -1)[:, :width])


FLOAT_TYPES = ("F32", "F16", "BF16")
#: GGUF block type -> form.
GGUF_FORMS: Mapping[str, BlockForm] = {
    "Q8_0": BlockForm(8, 32), "Q4_0": BlockForm(4, 32), "Q4_1": BlockForm(4, 32, True), "Q5_0": BlockForm(8, 32),
    "Q5_1": BlockForm(8, 32, True), "Q2_K": BlockForm(4, 16, True), "Q3_K": BlockForm(4, 16),
    "Q4_K": BlockForm(4, 32, True), "Q5_K": BlockForm(8, 32, True), "Q6_K": BlockForm(8, 16),
    "IQ4_NL": BlockForm(8, 32), "IQ4_XS": BlockForm(8, 32),
}  # fmt: skip
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)


def read_blocks(raw: Bytes, kind: str) -> Blocks:
    """Rows of a GGUF tensor as blocks.

    Args:
        raw: (N, bytes of a row) uint8.
        kind: one of GGUF_FORMS.

    Raises:
        ExportError: a type that has no form, or a scale that is no finite number.
    """
    if kind not in GGUF_FORMS:
        raise ExportError(f"weights of type {kind} are not read; {', '.join((*FLOAT_TYPES, *GGUF_FORMS))} are")
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    rows = len(raw)
    with np.errstate(invalid="ignore", over="ignore"):  # damaged scales are refused below
        blocks = _READERS[kind](np.ascontiguousarray(raw).reshape(-1, size))
    form = GGUF_FORMS[kind]
    codes = blocks.codes.reshape(rows, -1, form.block)
    offsets = None if blocks.offsets is None else blocks.offsets.reshape(rows, -1)
    made = Blocks(form.bits, codes, blocks.scales.reshape(rows, -1), offsets)
    if not np.isfinite(made.scales).all() or (offsets is not None and not np.isfinite(offsets).all()):
        raise ExportError("a scale is no finite number; the file is damaged, copy it again")
    return made


def quantize_8bit(rows: Float, block: int = 32) -> Blocks:
    """Symmetric blocks, s = max|w| / 127.

    Args:
        rows: (N, K) float32; a last block that is not full is filled up with zeros.
    """
    blocks = _in_blocks(rows, block)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks / np.where(scales == 0, np.float32(1), scales)) + 128
    return Blocks(8, codes.astype(np.uint8), scales[..., 0].astype(np.float32))


def quantize_4bit(rows: Float, importance: Float | None = None) -> Blocks:
    """Affine blocks of 32, w = d q + m.

    Without importance d = (max - min) / 15 and m = min, which is lossless for Q4_1. With it, several widths of the
    grid are tried, d and m are fitted to the codes of each by weighted least squares, and the best is kept for each
    block (as llama.cpp does for its K types).

    Args:
        rows: (N, K) float32; a last block that is not full is filled up with zeros.
        importance: (K,) mean square of what each weight is multiplied with.
    """
    blocks = _in_blocks(rows, 32)
    low = blocks.min(-1, keepdims=True)
    scales = (blocks.max(-1, keepdims=True) - low) / np.float32(15)
    codes = np.rint((blocks - low) / np.where(scales == 0, np.float32(1), scales)).astype(np.uint8)
    if importance is None:
        return Blocks(4, codes, scales[..., 0].astype(np.float32), (low + 8 * scales)[..., 0].astype(np.float32))
    weights = _in_blocks(np.asarray(importance, np.float32)[None] + np.float32(1e-12), 32)
    parts = [
        _fitted(blocks[start : start + _FITTED_ROWS], low[start : start + _FITTED_ROWS],
                scales[start : start + _FITTED_ROWS], weights)
        for start in range(0, len(blocks), _FITTED_ROWS)
    ]  # fmt: skip
    codes, d, m = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Blocks(4, codes, d, m + 8 * d)


#: Rows that are fitted at once, so that they stay in a core's cache, and widths that are tried, in steps of the grid.
_FITTED_ROWS = 32
_WIDTHS = (15.0, 14.4, 13.8, 15.6)


def _fitted(blocks: Float, low: Float, scales: Float, weights: Float) -> tuple[Bytes, Float, Float]:
    """Codes, d and m of the width with the smallest weighted square error, for each block.

    Sums are taken about the weighted means: few inputs may weigh a million times as much as the others, and then the
    same sums about 0 leave nothing of the others.
    """
    total = weights.sum(-1)
    mean_x = (blocks * weights).sum(-1) / total
    centred = blocks - mean_x[..., None]
    weighted = centred * weights
    sum_xx = (weighted * centred).sum(-1)
    best = np.full(sum_xx.shape, np.inf, np.float32)
    codes, d, m = np.zeros(blocks.shape, np.uint8), np.zeros_like(sum_xx), low[..., 0].copy()
    safe = np.where(scales == 0, np.float32(1), scales)
    for width in _WIDTHS:
        q = np.clip(np.rint((blocks - low) / safe * np.float32(width / 15)), 0, 15)
        mean_q = (q * weights).sum(-1) / total
        moved = q - mean_q[..., None]
        sum_qq, sum_qx = (moved * moved * weights).sum(-1), (moved * weighted).sum(-1)
        flat = sum_qq <= 0
        slope = np.where(flat, 0, sum_qx / np.where(flat, np.float32(1), sum_qq))
        start = mean_x - slope * mean_q
        error = sum_xx - slope * sum_qx
        better = error < best
        best = np.where(better, error, best)
        codes = np.where(better[..., None], q.astype(np.uint8), codes)
        d, m = np.where(better, slope, d), np.where(better, start, m)
    return codes, d.astype(np.float32), m.astype(np.float32)


def stored_rows(blocks: Blocks, width: int) -> tuple[Bytes, Float, Bytes | None]:
    """What MatMulNBits reads, offsets included: packed codes (N, blocks, bytes of a block), scales (N, blocks), and
    packed zero points (N, bytes) where blocks have some.

    Args:
        width: of the input.
    """
    codes, scales, zeros = blocks.codes, blocks.scales, blocks.zeros
    if blocks.offsets is not None:
        more_codes, more_scales = _extension(blocks.offsets, blocks.form, width)
        codes, scales = np.concatenate([codes, more_codes], 1), np.concatenate([scales, more_scales], 1)
    if zeros is not None and blocks.bits == 4:
        zeros = packed(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)), constant_values=8))
    return (packed(codes) if blocks.bits == 4 else codes), scales, zeros


def packed(codes: Bytes) -> Bytes:
    """Two 4-bit codes a byte, low nibble first."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def _extension(offsets: Float, form: BlockForm, width: int) -> tuple[Bytes, Float]:
    """Blocks that meet the copies of block sums.

    The first copy meets C in few bits; the columns behind the block that this ends in meet, each once, what is left of
    C. Columns that are left over meet 0.
    """
    rows, count = offsets.shape
    start = -(-count // form.block) * form.block
    columns = np.zeros((rows, (form.blocks(width) - count) * form.block), np.float32)
    columns[:, :count] = offsets
    codes, scales = _symmetric(columns, form)
    left = offsets - _values(codes, scales, form.bits)[:, :count]
    behind = np.arange(start, start + count)
    columns[:, behind] = left[:, behind % count]
    return _symmetric(columns, form)


def _symmetric(rows: Float, form: BlockForm) -> tuple[Bytes, Float]:
    """Codes (N, blocks, block) and scales (N, blocks); the value of largest size is the lowest code, and exact."""
    half = 1 << (form.bits - 1)
    blocks = rows.reshape(len(rows), -1, form.block)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scales = largest / np.float32(-half)
    codes = np.clip(np.rint(blocks / np.where(scales == 0, np.float32(1), scales)) + half, 0, 2 * half - 1)
    return codes.astype(np.uint8), scales[..., 0].astype(np.float32)


def _values(codes: Bytes, scales: Float, bits: int) -> Float:
    return ((codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]).reshape(len(codes), -1)


def _in_blocks(rows: Float, block: int) -> Float:
    missing = -rows.shape[1] % block
    if missing:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    return rows.reshape(len(rows), -1, block)


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
    return Blocks(4, _nibbles(b[:, 4:]), d, m + 8 * d)


def _q5_0(b: Bytes) -> Blocks:
    return Blocks(8, _codes((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]) << 4) + 112), _half(b[:, :2]))


def _q5_1(b: Bytes) -> Blocks:
    d, m = _half(b[:, :2]), _half(b[:, 2:4])
    return Blocks(8, _codes((_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]) << 4) + 112), d, m + 16 * d)


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
    return Blocks(4, _nibbles(b[:, 16:].reshape(-1, 4, 32)), d, m + 8 * d)


def _q5_k(b: Bytes) -> Blocks:
    d, m = _k_scales(b)
    low = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return Blocks(8, _codes((low | high << 4) + 112), d, m + 16 * d)


def _q6_k(b: Bytes) -> Blocks:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    scales = _half(b[:, 208:]) * b[:, 192:208].view(np.int8)
    return Blocks(8, _codes((low | high << 4) + 96), scales)


def _q3_k(b: Bytes) -> Blocks:
    raw = b[:, 96:108]
    low = np.concatenate([raw[:, :8] & 15, raw[:, :8] >> 4], 1)
    high = (raw[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(-1, 16)
    scales = _half(b[:, 108:]) * ((low | high << 4).astype(np.int8) - 32)
    two = (b[:, 32:96].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    third = (b[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return Blocks(4, _codes(two.reshape(-1, 8, 32) + 4 * third + 4), scales)


def _q2_k(b: Bytes) -> Blocks:
    d = _half(b[:, 80:82]) * (b[:, :16] & 15)
    m = -(_half(b[:, 82:84]) * (b[:, :16] >> 4))
    two = (b[:, 16:80].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    return Blocks(4, _codes(two + 7), d, m + d)


def _iq4_nl(b: Bytes) -> Blocks:
    return Blocks(8, (_IQ4 + 128).astype(np.uint8)[_nibbles(b[:, 2:])], _half(b[:, :2]))


def _iq4_xs(b: Bytes) -> Blocks:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], -1).reshape(-1, 8)
    scales = _half(b[:, :2]) * ((low | high << 4).astype(np.int16) - 32)
    return Blocks(8, (_IQ4 + 128).astype(np.uint8)[_nibbles(b[:, 8:].reshape(-1, 8, 16))], scales.astype(np.float32))


_READERS: Mapping[str, Callable[[Bytes], Blocks]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip
