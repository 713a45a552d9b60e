"""The scales of quantised keys and values, measured on calibration prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.decoder.rotary import Rotary
from edgecompose_export.graphs.kv_cache import PARTS, Bits, largest_code
from edgecompose_export.weights.blocks import Float

#: Of channels that were zero everywhere.
_SMALLEST_RANGE = 1e-5
#: Angles for which the two channels of a rotated pair are computed.
_ANGLES = 24


@dataclass(frozen=True, slots=True, eq=False)
class KVRanges:
    """The largest magnitudes of one layer's keys and values, (kv_heads, head_size) each, by the names in PARTS.

    Nothing may exceed them by much: a large key or value that is cut short costs more than all rounding. Calibration
    texts are short, and a rotation moves length between the two channels of a pair: slow ones do so at far positions
    only. So a rotated key counts with the largest value that it would have at any position of the context. The first
    key of a sequence, which is the largest by far in many bases, is never elsewhere and counts as it is.
    """

    largest: Mapping[str, Float]

    @classmethod
    def of(cls, config: DecoderConfig, layer: int, runs: Sequence[Mapping[str, Float]]) -> KVRanges:
        """Those of what some runs of the layer cached, (1, kv_heads, s, head_size) by the names in PARTS."""
        index = config.layers[layer].rotary
        rotary = None if index is None else config.rotaries[index]
        keys, values = ([run[part] for run in runs] for part in PARTS)
        tops = [np.abs(k).max((0, 2)) if rotary is None else _largest_rotated(k, rotary, config.context) for k in keys]
        return cls({"key": np.max(tops, axis=0), "value": np.max([np.abs(v).max((0, 2)) for v in values], axis=0)})

    def scales(self, bits: Bits) -> dict[str, Float]:
        """The step between two codes of each channel, (kv_heads * head_size,), by the names in PARTS."""
        return {
            part: (np.maximum(values, _SMALLEST_RANGE) / largest_code(bits)).astype(np.float32).reshape(-1)
            for part, values in self.largest.items()
        }


def _largest_rotated(keys: Float, rotary: Rotary, context: int) -> Float:
    """The largest magnitude of each channel of keys, had all but the first been read at any position of the context.

    Args:
        keys: (1, kv_heads, s, head_size), of positions 0 .. s - 1.

    Returns:
        (kv_heads, head_size) float32.
    """
    largest = np.asarray(np.abs(keys).max((0, 2)), np.float32)
    if keys.shape[2] == 1:
        return largest
    pairs, later = rotary.pairs, keys[:, :, 1:]
    one, other = later[..., :pairs], later[..., pairs : 2 * pairs]
    read = np.arange(1, keys.shape[2])[:, None] * rotary.frequencies  # angles (s - 1, pairs) that they have
    span = np.minimum(context * rotary.frequencies, np.pi)  # half a turn has all magnitudes
    if rotary.long_frequencies is not None:
        span = np.full_like(span, np.pi)
    for share in np.linspace(0, 1, _ANGLES):
        angle = share * span - read
        cos, sin = np.cos(angle), np.sin(angle)
        turned = np.concatenate([one * cos - other * sin, other * cos + one * sin, later[..., 2 * pairs :]], axis=-1)
        largest = np.maximum(largest, np.abs(turned).max((0, 2)))
    return np.asarray(largest, np.float32)
