"""Our decoder at work, as calls to time: one token, an answer, a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring.timing import Step
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.merged import MergedAdapter


def token_steps(decoder: Decoder, blend: MergedAdapter, ids: Sequence[int], *, capacity: int) -> Step:
    """A call that decodes one token greedily; a full sequence starts again after the prompt."""
    state = decoder.start(blend, capacity)
    token = int(state.forward(ids)[0].argmax())

    def step() -> None:
        nonlocal token
        if state.length == capacity:
            state.rewind(len(ids))
        token = int(state.step([token])[0].argmax())

    return step


def answers(decoder: Decoder, blend: MergedAdapter, ids: Sequence[int], *, tokens: int) -> Step:
    """A call that decodes so many tokens greedily after the prompt."""
    state = decoder.start(blend, len(ids) + tokens)
    first = int(state.forward(ids)[0].argmax())

    def write() -> None:
        state.rewind(len(ids))
        token = first
        for _ in range(tokens):
            token = int(state.step([token])[0].argmax())

    return write


def readings(decoder: Decoder, blend: MergedAdapter, ids: Sequence[int]) -> Step:
    """A call that reads the prompt and chooses the first token of the answer."""
    state = decoder.start(blend, len(ids) + 1)

    def read() -> None:
        state.rewind(0)
        state.forward(ids)[0].argmax()

    return read
