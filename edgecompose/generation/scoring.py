"""Scores choices by their likelihood."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import numpy.typing as npt

from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.errors import GenerationError
from edgecompose.generation.sampler import require_finite

Float = npt.NDArray[np.float32]


def score_choices(state: DecoderState, logits: Float, choices: Sequence[Sequence[int]]) -> Generator[float, None, None]:
    """Mean log-likelihood (nats a token) of each choice after the prompt, one after another.

    Every choice uses the prompt's KV cache: it is appended, scored, and taken back.

    Args:
        state: a sequence that has read the prompt.
        logits: (vocabulary,), those after the prompt's last token.
        choices: token ids of each, at least one id each.

    Raises:
        GenerationError: a choice without tokens, or logits that are not finite.
    """
    if any(len(choice) == 0 for choice in choices):
        raise GenerationError("an empty choice cannot be scored; give some text for each")
    prompt, first = state.length, logits.copy()
    for choice in choices:
        rows = first[None]
        if len(choice) > 1:
            rows = np.concatenate([rows, state.forward(choice[:-1], rows=len(choice) - 1)])
            state.rewind(prompt)
        likelihoods = log_softmax(rows)[np.arange(len(choice)), np.asarray(choice)]
        score = float(likelihoods.mean())
        require_finite(score)
        yield score


def log_softmax(logits: Float) -> Float:
    """Log-probabilities (nats) along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float32)
