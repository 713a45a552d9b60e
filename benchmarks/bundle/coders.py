"""Coders of blocks of values: `coder(blocks, bits)` gives the values that codes of so many bits stand for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.bundle.factors import Float

Coder = Callable[[Float, int], Float]
#: Scales that `fitted` tries, as shares of the largest value.
_SHRINKS = tuple(float(x) for x in np.linspace(1.0, 0.3, 15))


def fitted(blocks: Float, bits: int) -> Float:
    """Half-integer codes under the scale with the least squared error of a few; shapes are (..., block)."""
    half = 2 ** (bits - 1)
    least, result = np.full(blocks.shape[:-1], np.inf, np.float32), np.zeros_like(blocks)
    peaks = np.abs(blocks).max(-1, keepdims=True)
    for shrink in _SHRINKS if bits > 1 else (1.0,):
        steps = peaks * np.float32(shrink / half)
        codes = np.clip(np.floor(blocks / np.where(steps == 0, 1, steps)), -half, half - 1) + np.float32(0.5)
        fit = (blocks * codes).sum(-1, keepdims=True) / np.square(codes).sum(-1, keepdims=True)
        values = codes * _half_precision(fit)
        error = np.square(values - blocks).sum(-1)
        result = np.where((error < least)[..., None], values, result)
        least = np.minimum(error, least)
    return result


def rounded(blocks: Float, bits: int) -> Float:
    """Round to nearest between the least and the largest value, zero being a code; 1 bit is sign * mean."""
    if bits == 1:
        signs = np.where(blocks < 0, np.float32(-1), np.float32(1))
        return np.asarray(signs * _half_precision(np.abs(blocks).mean(-1, keepdims=True)), np.float32)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    steps = _half_precision((high - low) / (2**bits - 1))
    steps = np.where(steps == 0, np.float32(1), steps)
    zero = np.rint(-low / steps)
    codes = np.clip(np.rint(blocks / steps) + zero, 0, 2**bits - 1)
    return np.asarray((codes - zero) * steps, np.float32)


def _half_precision(scales: Float) -> Float:
    """Through float16, with a common gain as in the bundle format."""
    gain = np.float32(np.abs(scales).max() or 1)
    return np.asarray((scales / gain).astype(np.float16).astype(np.float32) * gain, np.float32)
