"""GPTQ: four bits with error feedback. The weights behind a weight compensate for its rounding error.

Source: GPTQ (arXiv 2210.17323), with blocks along the input axis. The scales of a block are searched when the block is
quantised.
"""

from __future__ import annotations

import numpy as np

from edgecompose_export.weights.blocks import Blocks, Float

#: Share of the mean of the diagonal that is added to it, for inputs that calibration has not seen.
_DAMPING = 0.05
#: Parts of a block's range that its scale may cover.
_RANGES = (1.0, 0.94, 0.88, 0.82, 0.76)
_LEVELS = 15
_SMALL = 256


class Compensation:
    """Error feedback for all weights that read one input.

    Args:
        gram: sum of x^T x over inputs x of calibration, (K, K) float32; it is overwritten.
    """

    def __init__(self, gram: Float) -> None:
        size = len(gram)
        diagonal = np.einsum("ii->i", gram)
        self.importance = diagonal.copy() + np.float32(1e-12)
        diagonal += np.float32(_DAMPING) * max(float(diagonal.mean()), 1e-12)
        # gram = R R^T with R upper triangular, so the inverse is U^T U with U = inverse of R
        flipped = np.ascontiguousarray(gram[::-1, ::-1])
        factor = np.linalg.cholesky(flipped)[::-1, ::-1]
        self.upper = _inverse_upper(np.ascontiguousarray(factor))
        assert self.upper.shape == (size, size)

    def quantize(self, rows: Float, block: int = 32) -> Blocks:
        """Rows (N, K) in 4 bits with integer zero points.

        Args:
            block: weights of a block, a divisor of K.
        """
        count, size = rows.shape
        weights = np.ascontiguousarray(rows.T)  # (K, N): a column of weights is one run of memory
        codes = np.empty((size, count), np.uint8)
        scales, zeros = (np.empty((size // block, count), np.float32) for _ in range(2))
        for start in range(0, size, block):
            stop = start + block
            part = weights[start:stop]
            scale, zero = _grid(part, self.importance[start:stop])
            scales[start // block], zeros[start // block] = scale, zero
            errors = np.empty_like(part)
            inner = self.upper[start:stop, start:stop]
            for i in range(block):
                code = np.clip(np.rint(part[i] / scale) + zero, 0, _LEVELS)
                codes[start + i] = code
                errors[i] = (part[i] - (code - zero) * scale) / inner[i, i]
                if i + 1 < block:
                    part[i + 1 :] -= inner[i, i + 1 :, None] * errors[i]
            if stop < size:
                weights[stop:] -= self.upper[start:stop, stop:].T @ errors
        blocks = np.ascontiguousarray(codes.T).reshape(count, -1, block)
        return Blocks(4, blocks, np.ascontiguousarray(scales.T), zeros=np.ascontiguousarray(zeros.T).astype(np.uint8))


def _grid(part: Float, importance: Float) -> tuple[Float, Float]:
    """Scale and zero point (N,) of one block (block, N), of the range with the smallest weighted error."""
    low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
    weight = importance[:, None]
    best = np.full(part.shape[1], np.inf, np.float32)
    scale, zero = np.ones_like(low), np.zeros_like(low)
    for share in _RANGES:
        step = (high - low) * np.float32(share / _LEVELS)
        step = np.where(step == 0, np.float32(1), step)
        origin = np.clip(np.rint(-low * np.float32(share) / step), 0, _LEVELS)
        code = np.clip(np.rint(part / step) + origin, 0, _LEVELS)
        error = (np.square(part - (code - origin) * step) * weight).sum(0)
        better = error < best
        best, scale, zero = (np.where(better, a, b) for a, b in ((error, best), (step, scale), (origin, zero)))
    return scale, zero


def _inverse_upper(matrix: Float) -> Float:
    """Inverse of an upper triangular matrix, by halves."""
    size = len(matrix)
    if size <= _SMALL:
        return np.asarray(np.triu(np.linalg.inv(matrix.astype(np.float64))), np.float32)
    half = size // 2
    first, last = _inverse_upper(matrix[:half, :half]), _inverse_upper(matrix[half:, half:])
    inverse = np.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ matrix[:half, half:]) @ last
    return inverse
