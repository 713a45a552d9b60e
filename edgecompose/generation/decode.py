"""Generates an answer from logits, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.generation.sampler import greedy
from edgecompose.generation.stopping import AnswerText

Float = npt.NDArray[np.float32]
#: Why an answer ended: an end token or a stop string, or the largest number of tokens.
Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an answer.

    Attributes:
        text: what became certain; empty where a token completes no character, or may begin a stop string.
        tokens: how many were drawn for it.
        finish_reason: why the answer ended, in the last chunk only.
    """

    text: str
    tokens: int = 0
    finish_reason: Finish | None = None


def decode(
    state: DecoderState,
    logits: Float,
    text: AnswerText,
    *,
    max_tokens: int,
    end_tokens: Sequence[int],
    draw: Callable[[Float], int] = greedy,
) -> Generator[Chunk, None, None]:
    """The answer, a chunk a token; the end token is not part of it.

    Args:
        state: a sequence that has read the prompt.
        logits: (vocabulary,), those after the prompt's last token.
        text: turns the tokens into text, and ends at a stop string.
        max_tokens: at least 1.
        draw: the next token from logits.
    """
    for position in range(max_tokens):
        token = draw(logits)
        if token in end_tokens:
            yield Chunk(text.finish(), finish_reason="stop")
            return
        shown = text.push(token)
        if text.stopped:
            yield Chunk(shown, 1, "stop")
            return
        if position + 1 == max_tokens:
            rest = text.finish()
            yield Chunk(shown + rest, 1, "stop" if text.stopped else "length")
            return
        yield Chunk(shown, 1)
        logits = state.step([token])[0]
