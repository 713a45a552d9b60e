"""Block quantisation of adapter factors (int8, int4, or float16).

A factor is kept layer-major, (L, r, n): L layers, r components, n inputs or outputs. Blocks run along n.
Value = gain * scale * code, with one float32 gain a factor and one float16 scale a block, so that the
scales use float16's normal range however small the factor is. Integer codes are kept as code + 2^(bits-1), unsigned.

* int8: code in -127 .. 127, one byte.
* int4: code in -8 .. 7; byte j of a layer's r n/2 holds element j of the layer's r n in its low nibble and element
  j + r n/2 in its high nibble, so that a whole half of a layer is unpacked in one operation.
* 16 bits: the code is a float16 in -1 .. 1, the value over the largest magnitude of its row; one scale a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from edgecompose.errors import AdapterError

Bits = Literal[4, 8, 16]
BITS: tuple[Bits, ...] = get_args(Bits)
Bytes = npt.NDArray[np.uint8]
Half = npt.NDArray[np.float16]
#: uint8, or float16 for 16 bits.
Codes = npt.NDArray[Any]
Float = npt.NDArray[np.float32]
#: Shrinking a block's scale a little can lower its squared error: clipped peaks against finer steps.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
_LARGEST_BLOCK = 32


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedFactor:
    """One factor of a module in all layers.

    `codes` is (L, r, n), float16 for 16 bits, uint8 for 8, or uint8 (L, r, n/2) for 4; `scales` is float16
    (L, r, n/block).
    """

    codes: Codes
    scales: Half
    gain: float
    bits: Bits

    @property
    def rank(self) -> int:
        """r, the number of components."""
        return int(self.codes.shape[1])

    @property
    def zero_point(self) -> int:
        """What a code of 0 is kept as."""
        return 0 if self.bits == 16 else 1 << (self.bits - 1)

    @property
    def width(self) -> int:
        """n, the number of values a row."""
        return int(self.codes.shape[2]) * (2 if self.bits == 4 else 1)

    @property
    def block(self) -> int:
        """Values that share a scale."""
        return self.width // int(self.scales.shape[2])


def block_for(width: int, bits: Bits) -> int:
    """How many values of a row share a scale: the largest power of two up to 32 that divides `width`, or the row."""
    return width if bits == 16 else min(_LARGEST_BLOCK, width & -width)


def quantize(factor: Float, bits: Bits) -> QuantizedFactor:
    """Quantise a factor.

    Args:
        factor: (L, r, n) float32, finite; n even for 4 bits.

    Raises:
        AdapterError: a value that is not finite, or an odd n with 4 bits.
    """
    if not np.isfinite(factor).all():
        raise AdapterError("a factor holds values that are not finite (NaN or infinity); repair or retrain the adapter")
    width = factor.shape[2]
    if bits == 4 and width % 2:
        raise AdapterError(f"a factor of odd width {width} cannot be kept in 4 bits; use 8 or 16")
    blocks = factor.reshape(*factor.shape[:2], -1, block_for(width, bits)).astype(np.float32)
    signed = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    steps = signed / -8 if bits == 4 else np.abs(signed) / (127 if bits == 8 else 1)
    gain = float(np.abs(steps).max()) or 1.0
    unit = np.float32(gain)  # squares of large or tiny values would leave float32
    if bits == 16:
        return _halves(blocks / unit, np.asarray(steps / unit, np.float16), gain)
    codes, scales = _best_codes(blocks / unit, np.asarray(steps / unit, np.float32), bits)
    raised = (codes.reshape(factor.shape) + (1 << (bits - 1))).astype(np.uint8)
    return QuantizedFactor(pack(raised, bits), scales, gain, bits)


def dequantize(factor: QuantizedFactor) -> Float:
    """The values (L, r, n) that a quantised factor stands for, float32."""
    codes = unpack(factor)
    blocks = codes.reshape(*codes.shape[:2], -1, factor.block).astype(np.float32) - np.float32(factor.zero_point)
    values = blocks * (factor.scales.astype(np.float32) * np.float32(factor.gain))[..., None]
    return np.asarray(values.reshape(codes.shape), np.float32)


def pack(raised: Codes, bits: Bits) -> Codes:
    """Codes (L, r, n), unsigned or float16, as they are kept."""
    if bits != 4:
        return raised
    layers, rank, width = raised.shape
    flat = raised.reshape(layers, -1)
    half = flat.shape[1] // 2
    return np.asarray(flat[:, :half] | (flat[:, half:] << 4), np.uint8).reshape(layers, rank, width // 2)


def unpack(factor: QuantizedFactor) -> Codes:
    """Codes (L, r, n), unsigned or float16."""
    flat = np.empty((len(factor.codes), factor.rank * factor.width), factor.codes.dtype)
    unpack_into(flat, factor, slice(None))
    return flat.reshape(-1, factor.rank, factor.width)


def unpack_into(flat: Codes, factor: QuantizedFactor, layers: slice) -> None:
    """Write the codes of some layers to `flat`, (layers, r n)."""
    codes = factor.codes[layers].reshape(len(flat), -1)
    if factor.bits != 4:
        np.copyto(flat, codes)
        return
    half = codes.shape[1]
    np.bitwise_and(codes, np.uint8(15), out=flat[:, :half])
    np.right_shift(codes, np.uint8(4), out=flat[:, half:])


def largest_magnitude(factor: QuantizedFactor) -> float:
    """A bound of the magnitudes of a factor's values: that of its largest scale and code; NaN or infinity where one is.

    Codes of 16 bits are read, others are taken as large as they can be.
    """
    code = float(1 << (factor.bits - 1))
    if factor.bits == 16:
        code = float(np.abs(factor.codes).max(initial=0))
    with np.errstate(all="ignore"):
        return float(np.abs(factor.scales).max(initial=0)) * abs(factor.gain) * code


def has_values_beyond(factor: QuantizedFactor, layer: int, rank: int) -> bool:
    """Whether a layer has values other than 0 in its rows from `rank` on."""
    one = replace(factor, codes=factor.codes[layer : layer + 1], scales=factor.scales[layer : layer + 1])
    return bool(dequantize(one)[0, rank:].any())


def relative_error(factor: Float, quantized: QuantizedFactor) -> float:
    """Frobenius norm of the error over that of the factor (0 for a zero factor)."""
    norm = float(np.linalg.norm(factor))
    return float(np.linalg.norm(factor - dequantize(quantized))) / norm if norm else 0.0


def _halves(rows: Float, scales: Half, gain: float) -> QuantizedFactor:
    """Values (L, r, 1, n) over their row's scale (L, r, 1, 1), in float16."""
    real = scales.astype(np.float32)
    codes = (rows / np.where(real == 0, np.float32(1), real)).astype(np.float16)
    return QuantizedFactor(codes[:, :, 0], scales[..., 0], gain, 16)


def _best_codes(blocks: Float, steps: Float, bits: Bits) -> tuple[Float, npt.NDArray[np.float16]]:
    """For each block the codes and the scale with the least squared error among a few shrinks."""
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    best_error = np.full(steps.shape, np.inf, np.float32)
    best_codes = np.zeros_like(blocks)
    best_scales = np.zeros(steps.shape, np.float16)
    for shrink in _SHRINKS if bits == 4 else (1.0,):
        scales = (steps * np.float32(shrink)).astype(np.float16)
        real = scales.astype(np.float32)
        codes = np.clip(np.rint(blocks / np.where(real == 0, np.float32(1), real)), low, high)
        error = np.square(codes * real - blocks).sum(-1, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_codes = np.where(better, codes, best_codes)
        best_scales = np.where(better, scales, best_scales)
    return best_codes, best_scales[..., 0]
