"""Drops entries of quantised factors, by magnitude or at random; knows nothing of weights or devices.

What is dropped does not depend on the prompt: a trimmed factor is a quantised factor with more codes of 0.

* `prune` keeps floor(density * entries) entries of each layer's factor, those of largest magnitude
  (TIES, arXiv 2306.01708; PEFT `magnitude_prune`); of equal magnitudes the first in row-major order stay.
* `drop` keeps each entry with probability `density` (DARE, arXiv 2311.03099). The caller divides by the density.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgecompose.errors import MergeError
from edgecompose.quantization import QuantizedFactor, dequantize, pack, unpack

Float = npt.NDArray[np.float32]
#: Densities whose thresholds are kept with an adapter; those of others are found by partial sorting.
DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def kept_entries(density: float, entries: int) -> int:
    """How many entries of a tensor a density keeps: floor(density * entries), as PEFT counts.

    Raises:
        MergeError: none would be kept.
    """
    kept = int(density * entries)
    if kept == 0:
        least = math.ceil(1e6 / entries) / 1e6
        raise MergeError(f"density {density} keeps none of {entries} entries; raise it to at least {least}")
    return kept


def thresholds(factor: QuantizedFactor) -> Float:
    """Smallest magnitude that `prune` keeps, (9, L) float32, for each of DENSITIES and each layer.

    0 where a density keeps nothing.
    """
    magnitudes = _magnitudes(factor)
    ordered = np.sort(magnitudes, axis=-1)
    found = np.zeros((len(DENSITIES), len(magnitudes)), np.float32)
    for row, density in zip(found, DENSITIES, strict=True):
        kept = int(density * magnitudes.shape[1])
        if kept:
            row[:] = ordered[:, -kept]
    return found


def prune(factor: QuantizedFactor, density: float, known: Float | None = None) -> QuantizedFactor:
    """Keep the largest magnitudes of each layer.

    Args:
        density: in (0, 1]; 1 keeps everything.
        known: `thresholds(factor)`, to save a partial sort where it holds the density.

    Raises:
        MergeError: the density keeps nothing.
    """
    magnitudes = _magnitudes(factor)
    kept = kept_entries(density, magnitudes.shape[1])
    if kept == magnitudes.shape[1]:
        return factor
    if known is not None and density in DENSITIES:
        least = known[DENSITIES.index(density)]
    else:
        least = np.partition(magnitudes, -kept, axis=-1)[:, -kept]
    keep = magnitudes >= least[:, None]
    for layer in np.flatnonzero(keep.sum(axis=-1) > kept):  # equal magnitudes at the threshold: the first stay
        equal = np.flatnonzero(magnitudes[layer] == least[layer])
        surplus = int(keep[layer].sum()) - kept
        keep[layer, equal[len(equal) - surplus :]] = False
    return _masked(factor, keep)


def drop(factor: QuantizedFactor, density: float, seed: str) -> QuantizedFactor:
    """Keep each entry with probability `density` in (0, 1], the same entries for the same seed."""
    shape = (*factor.codes.shape[:2], factor.width)
    return _masked(factor, random_mask(shape, density, seed))


def random_mask(shape: tuple[int, ...], density: float, seed: str) -> npt.NDArray[np.bool_]:
    """True with probability `density`, entry by entry, the same for the same seed on every machine."""
    stream = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "little")))
    return np.asarray(stream.random(shape, np.float32) < density)


def _masked(factor: QuantizedFactor, keep: npt.NDArray[np.bool_]) -> QuantizedFactor:
    codes = unpack(factor)
    codes[~keep.reshape(codes.shape)] = factor.zero_point
    return replace(factor, codes=pack(codes, factor.bits))


def _magnitudes(factor: QuantizedFactor) -> Float:
    """(L, r n)."""
    values = dequantize(factor)
    return np.abs(values, out=values).reshape(len(values), -1)
