"""Linear weights in blocks of 4 or 8 bits, in the forms that ONNX Runtime's MatMulNBits has fast kernels for.

A row is cut into blocks of 16 or more weights along the input axis, w = s (q - z) + c, where z is 8 for 4 bits and 128
for 8 bits unless blocks have zero points of their own. The kernel has int8 activations (accuracy level 4) and computes
the first term; the second is blocksums(x) @ C. So x is extended by copies of its sums over blocks, and each row by C
in the same bits and, behind it, by the rest of C in the same bits again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
        """The form of these blocks."""
        return BlockForm(self.bits, self.codes.shape[2], offsets=self.offsets is not None, zeros=self.zeros is not None)

    def __getitem__(self, rows: slice) -> Blocks:
        """Some of the rows."""
        offsets = None if self.offsets is None else self.offsets[rows]
        zeros = None if self.zeros is None else self.zeros[rows]
        return Blocks(self.bits, self.codes[rows], self.scales[rows], offsets=offsets, zeros=zeros)

    def values(self, width: int) -> Float:
        """The weights, (N, width) float32."""
        zero = np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[..., None].astype(np.float32)
        rows = (self.codes.astype(np.float32) - zero) * self.scales[..., None]
        if self.offsets is not None:
            rows += self.offsets[..., None]
        return np.ascontiguousarray(rows.reshape(len(rows), -1)[:, :width])


def stored_rows(blocks: Blocks, width: int) -> tuple[Bytes, Float, Bytes | None]:
    """The inputs of MatMulNBits, offsets included: packed codes (N, blocks, bytes of a block), scales (N, blocks), and
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
    """Blocks that multiply the copies of block sums.

    The first copy multiplies C in few bits. The columns after its last block multiply the rest of C, each once; the
    columns after those are 0.
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
