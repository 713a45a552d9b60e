"""Rotary position embeddings: inverse frequencies and their scalings, as transformers computes them (float32).

Sources: RoFormer (arXiv 2104.09864), linear interpolation (2306.15595), YaRN (2309.00071), LongRoPE (2402.13753), and
transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.errors import ExportError

Float = npt.NDArray[np.float32]
_MOST_DIMENSIONS = 1 << 16
#: Scalings of `rope_scaling` that are computed here.
SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """The rotation of queries and keys in some layers.

    Attributes:
        frequencies: inverse frequencies, (pairs,) float32, in radians a position; the first 2 x pairs values of a
            head rotate.
        scale: factor of cosines and sines.
        long_frequencies: for sequences longer than `long_from` tokens, None where length does not matter.
        theta, scaling: `rope_theta` and `rope_scaling` of a configuration of transformers 4.
    """

    frequencies: Float
    scale: float = 1.0
    long_frequencies: Float | None = None
    long_from: int | None = None
    theta: float = 10000.0
    scaling: Mapping[str, Any] | None = None

    @property
    def pairs(self) -> int:
        """How many pairs of a head's values rotate."""
        return len(self.frequencies)


def rotary_from_config(
    theta: float, dimensions: int, scaling: Mapping[str, Any] | None, *, context: int, original: int | None = None
) -> Rotary:
    """The rotation that a configuration describes.

    Args:
        theta: base of the frequencies.
        dimensions: values of a head that rotate, an even number.
        scaling: `rope_scaling` of transformers 4, or `rope_parameters` of transformers 5; None for none.
        context: `max_position_embeddings`.
        original: `original_max_position_embeddings` of the configuration itself (Phi3).

    Raises:
        ExportError: the scaling is unknown, or one of its numbers is missing or not positive.
    """
    if dimensions % 2 or not 2 <= dimensions <= _MOST_DIMENSIONS:
        raise ExportError(f"{dimensions} values of a head rotate, expected an even number from 2 to {_MOST_DIMENSIONS}")
    if not 0 < theta < 1e38:
        raise ExportError(f"rope_theta is {theta!r:.40}, expected a positive number")
    with np.errstate(all="ignore"):  # the check below refuses NaN and infinity
        rotary = _scaled(theta, dimensions, scaling or {}, context=context, original=original)
    numbers = rotary.frequencies if rotary.long_frequencies is None else (rotary.frequencies, rotary.long_frequencies)
    if not (np.isfinite(numbers).all() and np.min(numbers) > 0 and 0 < rotary.scale < 1e38):
        raise ExportError(
            f"rope_theta {theta!r:.40} and rope_scaling {scaling!r:.80} give frequencies that are not positive; "
            "copy config.json again"
        )
    return dataclasses.replace(rotary, theta=theta, scaling=scaling or None)


def llama3_scaling(frequencies: Float, divisors: Float) -> dict[str, Any] | None:
    """The `rope_scaling` of kind llama3 that has these divisors. GGUF files hold the divisors only.

    Wavelengths between `original / high_freq_factor` and `original / low_freq_factor` have a factor that is linear in
    the frequency; two of them give that line. `low_freq_factor` is 1, since only the ratios of the three numbers count.

    Args:
        frequencies: inverse frequencies before division, (pairs,) float32.
        divisors: (pairs,) float32, the tensor `rope_freqs`.

    Returns:
        None where no such scaling comes within 1e-4 of the divisors.
    """
    factor = float(divisors.max())
    if factor <= 1 or divisors.min() < 1:
        return None
    turns = frequencies.astype(np.float64) / (2 * math.pi)
    between = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    smooth = (1 / divisors.astype(np.float64)[between] - 1 / factor) / (1 - 1 / factor)
    if between.sum() > 1:
        slope, start = np.polyfit(turns[between], smooth, 1)
        originals = [(slope / -start, 1 - 1 / start)] if start < 0 else []
    elif between.any():  # the usual ratio of the two factors
        originals = [(float((smooth[0] * 3 + 1) / turns[between][0]), 4.0)]
    else:
        whole, divided = turns[divisors <= 1 + 1e-6], turns[divisors > 1 + 1e-6]
        highest = 4 / float(whole.min()) if len(whole) else math.inf
        originals = [(min(1 / float(divided.max()), highest) * 0.999, 4.0)]
    for original, high in originals:
        near = round(original)
        scaling = {
            "rope_type": "llama3",
            "factor": round(factor, 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": round(float(high), 3),
            "original_max_position_embeddings": near,
        }
        if high > 1 and near > 0 and np.allclose(frequencies / divisors, _llama3(frequencies, scaling), rtol=1e-4):
            return scaling
    return None


def _scaled(theta: float, dimensions: int, scaling: Mapping[str, Any], *, context: int, original: int | None) -> Rotary:
    pairs = np.float32(theta) ** (np.arange(0, dimensions, 2, dtype=np.float32) / np.float32(dimensions))
    frequencies = (np.float32(1) / pairs).astype(np.float32)
    kind = str(scaling.get("rope_type", scaling.get("type", "default")) or "default")
    if kind == "su":
        kind = "longrope"
    if kind not in SCALINGS:
        raise ExportError(
            f"rope_scaling has the type {kind!r:.40}, expected one of {', '.join(SCALINGS)}; give such a base"
        )
    if kind in ("default", "dynamic"):  # dynamic scaling begins where the context ends
        return Rotary(frequencies)
    if kind == "linear":
        return Rotary(frequencies / np.float32(_number(scaling, "factor")))
    if kind == "llama3":
        return Rotary(_llama3(frequencies, scaling))
    if kind == "yarn":
        return _yarn(frequencies, scaling, theta=theta, dimensions=dimensions, context=context)
    return _longrope(frequencies, scaling, context=context, original=original)


def longrope_scale(context: int, original: int) -> float:
    """LongRoPE's factor of cosines and sines for a context that was extended from `original` tokens."""
    return 1.0 if context <= original else math.sqrt(1 + math.log(context / original) / math.log(original))


def _llama3(frequencies: Float, scaling: Mapping[str, Any]) -> Float:
    factor, original = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, blended)
    return np.where(wavelengths < original / high, frequencies, scaled).astype(np.float32)


def _yarn(frequencies: Float, scaling: Mapping[str, Any], *, theta: float, dimensions: int, context: int) -> Rotary:
    factor = _number(scaling, "factor")
    original = float(scaling.get("original_max_position_embeddings") or context)

    def correction(rotations: float) -> float:
        return dimensions * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    low = correction(float(scaling.get("beta_fast") or 32))
    high = correction(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimensions - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(len(frequencies), dtype=np.float32) - low) / width, 0, 1)
    scaled = frequencies / np.float32(factor) * ramp + frequencies * (1 - ramp)
    scale = scaling.get("attention_factor")
    if scale is None:
        both = scaling.get("mscale"), scaling.get("mscale_all_dim")
        scale = mscale(both[0]) / mscale(both[1]) if both[0] and both[1] else mscale(1)
    return Rotary(scaled.astype(np.float32), float(scale))


def _longrope(frequencies: Float, scaling: Mapping[str, Any], *, context: int, original: int | None) -> Rotary:
    start = original or scaling.get("original_max_position_embeddings")
    scale = scaling.get("attention_factor")
    if scale is None:
        if original:
            scale = longrope_scale(context, original)
        else:
            factor = float(scaling.get("factor") or 1.0)
            scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    short, long = (_factors(scaling, f"{name}_factor", len(frequencies)) for name in ("short", "long"))
    return Rotary(
        frequencies / short, float(scale), long_frequencies=frequencies / long, long_from=int(start or context)
    )


def _factors(scaling: Mapping[str, Any], name: str, count: int) -> Float:
    values = scaling.get(name)
    if not isinstance(values, list | tuple) or len(values) != count:
        length = len(values) if isinstance(values, list | tuple) else "no list"
        raise ExportError(f"rope_scaling: {name} has {length} entries, expected {count}; copy config.json again")
    factors = np.array(values, np.float32)
    if factors.shape != (count,) or not factors.min() > 0:
        raise ExportError(f"rope_scaling: {name} holds values that are not positive numbers; copy config.json again")
    return factors


def _number(scaling: Mapping[str, Any], name: str) -> float:
    value = scaling.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or not math.isfinite(value):
        raise ExportError(f"rope_scaling: {name} is {value!r:.40}, expected a positive number; copy config.json again")
    return float(value)
