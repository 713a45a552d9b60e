"""Sparsifies quantised factors, by magnitude or at random.

What is dropped does not depend on the prompt: a sparse factor is a quantised factor with more codes of 0. Both ways
keep a share of the entries, the density:

* by magnitude: the floor(density * entries) largest of each layer's factor (TIES, arXiv 2306.01708; PEFT
  `magnitude_prune`); of equal magnitudes the first in row-major order stay.
* at random: each entry with probability `density` (DARE, arXiv 2311.03099); the caller divides by the density.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.adapter import DENSITIES, AdapterModule
from edgecompose.bundle.quantization import Codes, QuantizedFactor, dequantize, pack, unpack
from edgecompose.errors import MergeError
from edgecompose.merging import core_space

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
#: A code that no block has: nothing of it is kept.
_NO_CODE = 255


def kept_entries(density: float, entries: int) -> int:
    """How many entries of a tensor a density keeps: floor(density * entries), as PEFT counts.

    Raises:
        MergeError: no entry would be kept.
    """
    count = int(density * entries)
    if count == 0:
        least = math.ceil(1e6 / entries) / 1e6
        raise MergeError(f"density {density} keeps none of {entries} entries; raise it to at least {least}")
    return count


def thresholds(factor: QuantizedFactor) -> Float:
    """Smallest magnitude that `keep_largest` keeps, (9, L) float32, for each of DENSITIES and each layer.

    0 where a density keeps nothing.
    """
    magnitudes = _magnitudes(factor)
    ordered = np.sort(magnitudes, axis=-1)
    least = np.zeros((len(DENSITIES), len(magnitudes)), np.float32)
    for row, density in zip(least, DENSITIES, strict=True):
        count = int(density * magnitudes.shape[1])
        if count:
            row[:] = ordered[:, -count]
    return least


def keep_largest(factor: QuantizedFactor, density: float, known: Float | None = None) -> QuantizedFactor:
    """Keep the largest magnitudes of each layer.

    Args:
        density: in (0, 1]; 1 keeps everything.
        known: `thresholds(factor)`, to save a partial sort where it holds the density.

    Raises:
        MergeError: the density keeps nothing.
    """
    entries = factor.rank * factor.width
    count = kept_entries(density, entries)
    if count == entries:
        return factor
    if known is not None and density in DENSITIES:
        least = known[DENSITIES.index(density)]
    else:
        least = np.partition(_magnitudes(factor), -count, axis=-1)[:, -count]
    codes = unpack(factor)
    keep, equal = _reaching(factor, codes, least)
    keep = keep.reshape(len(least), -1)
    for layer, mask in enumerate(keep):
        surplus = int(np.count_nonzero(mask)) - count
        if surplus > 0:  # equal magnitudes at the threshold: the first stay
            mask[equal(layer)[-surplus:]] = False
    return _masked(factor, codes, keep)


def _reaching(factor: QuantizedFactor, codes: Codes, least: Float) -> tuple[Mask, Callable[[int], Indices]]:
    """Which magnitudes reach `least` (L,), as (L, r, n), and for a layer the flat indices of those that equal it.

    Integers are compared as they are: each block has a least code.
    """
    if factor.bits == 16:
        magnitudes = _magnitudes(factor)
        reached = (magnitudes >= least[:, None]).reshape(codes.shape)
        return reached, lambda layer: np.flatnonzero(magnitudes[layer] == least[layer])
    steps = np.abs(factor.scales.astype(np.float32) * np.float32(factor.gain))
    limits = np.broadcast_to(least[:, None, None], steps.shape)
    first = np.divide(limits, steps, out=np.full_like(steps, _NO_CODE), where=steps > 0)
    first = np.minimum(np.ceil(first), np.float32(_NO_CODE))
    first = np.where((first - 1) * steps >= limits, first - 1, first)  # as the products round, not as the quotient does
    first = np.where(first * steps < limits, first + 1, first)
    first = np.where(limits <= 0, np.float32(0), np.minimum(first, np.float32(_NO_CODE)))
    exact = first * steps == limits
    least_codes, zero = first.astype(np.uint8), np.uint8(factor.zero_point)
    distance = np.maximum(codes, zero) - np.minimum(codes, zero)

    def equal(layer: int) -> Indices:
        rows, blocks = np.nonzero(exact[layer])
        within = distance[layer].reshape(factor.rank, -1, factor.block)[rows, blocks]
        hit, offset = np.nonzero(within == least_codes[layer][rows, blocks][:, None])
        return np.asarray(rows[hit] * factor.width + blocks[hit] * factor.block + offset, np.int64)

    return np.asarray(distance >= np.repeat(least_codes, factor.block, axis=-1)), equal


def keep_random(factor: QuantizedFactor, density: float, seed: str) -> QuantizedFactor:
    """Keep each entry with probability `density` in (0, 1], the same entries for the same seed."""
    shape = (*factor.codes.shape[:2], factor.width)
    return _masked(factor, unpack(factor), random_mask(shape, density, seed))


def random_mask(shape: tuple[int, ...], density: float, seed: str) -> Mask:
    """True with probability `density`, entry by entry, the same for the same seed on every machine."""
    stream = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "little")))
    return np.asarray(stream.random(shape, np.float32) < density)


def _masked(factor: QuantizedFactor, codes: Codes, keep: Mask) -> QuantizedFactor:
    """The factor with codes of 0 where the mask is False; overwrites `codes`. A product is faster than np.where."""
    zero, mask = factor.zero_point, keep.reshape(codes.shape)
    integers = codes.view(np.uint16) if factor.bits == 16 else codes  # the bits of 0.0 are 0
    integers -= integers.dtype.type(zero)
    integers *= mask
    integers += integers.dtype.type(zero)
    return replace(factor, codes=pack(codes, factor.bits))


def _magnitudes(factor: QuantizedFactor) -> Float:
    """(L, r n)."""
    values = dequantize(factor)
    return np.abs(values, out=values).reshape(len(values), -1)


@dataclass(frozen=True, slots=True)
class Sparsify:
    """One way to drop entries before adapters are combined.

    Attributes:
        module: a module of an adapter, a density and a seed -> the module without the dropped entries.
        cores: updates (K, L, R, R), a density and a seed for each -> the same with zeros, what is kept rescaled.
        seeded: the seed decides which entries stay.
        rescales: what is kept of a factor has to be divided by the density.
    """

    name: Literal["magnitude", "random"]
    module: Callable[[AdapterModule, float, str], AdapterModule]
    cores: Callable[[Double, float, Sequence[str]], Double]
    seeded: bool = False
    rescales: bool = False


def _largest_of_module(module: AdapterModule, density: float, seed: str) -> AdapterModule:
    a, b = (
        keep_largest(factor, density, known)
        for factor, known in zip((module.a, module.b), module.thresholds, strict=True)
    )
    return replace(module, a=a, b=b)


def _random_of_module(module: AdapterModule, density: float, seed: str) -> AdapterModule:
    a = keep_random(module.a, density, f"{seed}/A")
    return replace(module, a=a, b=keep_random(module.b, density, f"{seed}/B"))


def _largest_of_cores(cores: Double, density: float, seeds: Sequence[str]) -> Double:
    return core_space.prune(cores, kept_entries(density, cores[0, 0].size))


def _random_of_cores(cores: Double, density: float, seeds: Sequence[str]) -> Double:
    masks = np.stack([random_mask(cores.shape[1:], density, seed) for seed in seeds])
    return np.asarray(cores * masks / density, np.float64)


MAGNITUDE = Sparsify("magnitude", _largest_of_module, _largest_of_cores)
RANDOM = Sparsify("random", _random_of_module, _random_of_cores, seeded=True, rescales=True)
