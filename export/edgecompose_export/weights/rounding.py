"""Blocks of 8 or 4 bits by rounding: each weight is rounded by itself, without regard to the others."""

from __future__ import annotations

import numpy as np

from edgecompose_export.weights.blocks import Blocks, Bytes, Float


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
    grid are tried, d and m are fitted to the codes of each by weighted least squares, and the best is taken for each
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
        return Blocks(
            4, codes, scales[..., 0].astype(np.float32), offsets=(low + 8 * scales)[..., 0].astype(np.float32)
        )
    weights = _in_blocks(np.asarray(importance, np.float32)[None] + np.float32(1e-12), 32)
    parts = [
        _fitted(
            blocks[start : start + _FITTED_ROWS],
            low[start : start + _FITTED_ROWS],
            scales[start : start + _FITTED_ROWS],
            weights=weights,
        )
        for start in range(0, len(blocks), _FITTED_ROWS)
    ]
    codes, d, m = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Blocks(4, codes, d, offsets=m + 8 * d)


#: Rows that are fitted at once (they fit a core's cache), and widths of the grid to try, in steps.
_FITTED_ROWS = 32
_WIDTHS = (15.0, 14.4, 13.8, 15.6)


def _fitted(blocks: Float, low: Float, scales: Float, *, weights: Float) -> tuple[Bytes, Float, Float]:
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


def _in_blocks(rows: Float, block: int) -> Float:
    missing = -rows.shape[1] % block
    if missing:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    return rows.reshape(len(rows), -1, block)
