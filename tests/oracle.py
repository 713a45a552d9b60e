"""What each merge method should give, in float64 numpy on the dequantised factors of one module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.adapter import AdapterModule
from edgecompose.bundle.quantization import dequantize
from edgecompose.merging.methods import method_of
from edgecompose.settings import MergeSettings

Double = npt.NDArray[np.float64]
Part = tuple[AdapterModule, float]


def factors(module: AdapterModule) -> tuple[Double, Double]:
    """A (L, in, r) and B (L, r, out)."""
    return dequantize(module.a).transpose(0, 2, 1).astype(np.float64), dequantize(module.b).astype(np.float64)


def delta(parts: Sequence[Part]) -> Double:
    """Sum of w s A B, (L, in, out)."""
    products = [w * module.scaling[:, None, None] * np.matmul(*factors(module)) for module, w in parts]
    return np.asarray(np.sum(products, axis=0), np.float64)


def merge(parts: Sequence[Part], settings: MergeSettings) -> tuple[Double, Double]:
    """Merged A (L, in, R) and B (L, R, out)."""
    weights = [w * module.scaling.astype(np.float64)[:, None, None] for module, w in parts]
    both = [factors(module) for module, _ in parts]
    if method_of(settings).plan != "entrywise":
        a = np.concatenate([w * a for w, (a, _) in zip(weights, both, strict=True)], axis=2)
        return a, np.concatenate([b for _, b in both], axis=1)
    roots = [np.sqrt(np.abs(w)) for w in weights]
    signed = [np.sign(w) * root for w, root in zip(weights, roots, strict=True)]
    return _combine([a for a, _ in both], signed, settings), _combine([b for _, b in both], roots, settings)


def prune(values: Double, density: float) -> Double:
    """Keep the largest magnitudes of one tensor; a tie at the threshold has no right answer and is refused."""
    remaining = int(density * values.size)
    order = np.sort(np.abs(values), axis=None)[::-1]
    if remaining < values.size and order[remaining] == order[remaining - 1] != 0:
        raise ValueError("two values tie at the pruning threshold; take other values")
    return np.where(np.abs(values) >= order[remaining - 1], values, 0.0)


def _combine(tensors: Sequence[Double], weights: Sequence[Double], settings: MergeSettings) -> Double:
    if method_of(settings).sparsify is not None:
        tensors = [np.stack([prune(layer, settings.density) for layer in tensor]) for tensor in tensors]
    weighted = np.array([w * tensor for w, tensor in zip(weights, tensors, strict=True)])
    if "majority_sign" not in method_of(settings).parameters:
        return np.asarray(weighted.sum(axis=0), np.float64)
    votes = np.array(tensors) if settings.majority_sign == "total" else np.sign(tensors)
    elected = np.where(votes.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(tensors) == elected
    return np.asarray((weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1), np.float64)
