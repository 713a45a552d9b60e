"""From the last block to logits: the final norm and the output layer, in chunks of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.weights.blocks import Float
from edgecompose_export.weights.places import EMBEDDING, FINAL_NORM, HEAD
from edgecompose_export.weights.source import WeightSource

#: Logits of a chunk, and the smallest number of rows of the output layer in a chunk.
_LOGITS, _FEWEST_ROWS = 1 << 23, 1 << 11


def final_norm(source: WeightSource, values: Float) -> Float:
    """The norm before the output layer, in float64 arithmetic."""
    config, wide = source.config, values.astype(np.float64)
    if config.architecture.norm == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + config.epsilon) * source.floats(FINAL_NORM)
    if config.architecture.norm == "layer":
        wide = wide + source.floats(FINAL_NORM.replace("weight", "bias"))
    return np.asarray(wide, np.float32)


def float_logits(source: WeightSource, states: Float) -> Iterator[Float]:
    """Logits of hidden states (n, hidden) from the float values of the file, in chunks (n, rows) of the vocabulary."""
    tensor = EMBEDDING if source.config.tied else HEAD
    for start, stop in vocabulary_chunks(source.config, len(states)):
        yield scaled_logits(source.config, states @ source.floats(tensor, start, stop).T)


def scaled_logits(config: DecoderConfig, logits: Float) -> Float:
    """Logits from the products of the output layer: divided and capped as the architecture does."""
    logits = logits / np.float32(config.logit_divisor)
    cap = np.float32(config.logit_softcap)
    return cap * np.tanh(logits / cap) if cap else logits


def vocabulary_chunks(config: DecoderConfig, positions: int) -> Iterator[tuple[int, int]]:
    """Ranges of token ids whose logits are computed together."""
    step = max(_FEWEST_ROWS, _LOGITS // positions)
    for start in range(0, config.vocabulary, step):
        yield start, min(start + step, config.vocabulary)
