"""Generates an answer from logits, chunk by chunk.

With drafts, several tokens are appended to the sequence in one pass and their logits come back together. Each token of
the answer is drawn from the logits that it would be drawn from alone, in the same order and with the same random
numbers; where it is the drafted one the next logits are there already, and where it is not the sequence is rewound. So
the answer is the same, whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.generation.drafts.drafter import Drafter
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
        drafted: how many tokens were drafted in the pass before it.
        accepted: whether its token had been drafted, 1 or 0.
    """

    text: str
    tokens: int = 0
    finish_reason: Finish | None = None
    drafted: int = 0
    accepted: int = 0


class _Logits:
    """The logits for each next token: of the row behind a draft that was right, or of a new pass.

    Attributes:
        row: (vocabulary,), those for the next token.
        drafted: tokens that were drafted in the pass that gave `row`, 0 where an earlier row came from that pass.
    """

    def __init__(self, state: DecoderState, row: Float, drafter: Drafter | None) -> None:
        self.row, self.drafted = row, 0
        self._state, self._drafter = state, drafter
        self._draft: list[int] = []
        self._rows: list[Float] = []
        self._length = state.length

    def expects(self, token: int) -> bool:
        """Whether this is the drafted token."""
        return self._draft[:1] == [token]

    def advance(self, token: int, room: int) -> None:
        """Append a token that was drawn from `row`.

        Args:
            room: how many tokens the answer may have after it.
        """
        if self._drafter is not None:
            self._drafter.append(token)
        if self.expects(token):
            self.drafted = 0
            del self._draft[0]
        else:
            self.rewind()
            self._pass(token, room)
        self._length += 1
        self.row = self._rows.pop(0)

    def rewind(self) -> None:
        """Take back what was drafted and not drawn."""
        if self._state.length > self._length:
            self._state.rewind(self._length)
        self._draft, self._rows = [], []

    def _pass(self, token: int, room: int) -> None:
        state = self._state
        if self._drafter is not None:  # the token itself takes one place, the last one of an answer is not appended
            self._draft = self._drafter.propose(min(room, state.reversible_room) - 1, beside=state.beside)
        self.drafted = len(self._draft)
        self._rows = list(state.step([token, *self._draft]))


def decode(
    state: DecoderState,
    logits: Float,
    text: AnswerText,
    *,
    max_tokens: int,
    end_tokens: Collection[int],
    draw: Callable[[Float], int] = greedy,
    drafter: Drafter | None = None,
) -> Generator[Chunk, None, None]:
    """The answer, a chunk a token; the end token is not part of it.

    However it ends, the sequence has the prompt and the answer's tokens, but for the last one where that is no end
    token.

    Args:
        state: a sequence that has read the prompt.
        logits: (vocabulary,), those after the prompt's last token.
        text: turns the tokens into text, and ends at a stop string.
        max_tokens: at least 1.
        draw: the next token from logits.
        drafter: guesses the next tokens; that does not change the answer.
    """
    source = _Logits(state, logits, drafter)
    try:
        for position in range(max_tokens):
            token = draw(source.row)
            if token in end_tokens:
                yield Chunk(text.finish(), finish_reason="stop", drafted=source.drafted)
                return
            shown = text.push(token)
            finish: Finish | None = "stop" if text.stopped else None
            if finish is None and position + 1 == max_tokens:
                shown += text.finish()
                finish = "stop" if text.stopped else "length"
            yield Chunk(shown, 1, finish, source.drafted, int(source.expects(token)))
            if finish is not None:
                return
            source.advance(token, max_tokens - position - 1)
    finally:
        source.rewind()
