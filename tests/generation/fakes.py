"""A sequence over a model of a few tokens, for tests of decoding and scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Model = Callable[[tuple[int, ...]], Float]
VOCABULARY = 12


class FakeState:
    """A sequence whose logits are a function of all its tokens; like the real one it reuses its output.

    `passes` holds the number of tokens of each step.
    """

    def __init__(self, model: Model, prompt: Sequence[int] = (1, 2, 3), *, capacity: int = 10_000) -> None:
        self._model, self._capacity = model, capacity
        self.passes: list[int] = []
        self.beside = 0
        self.tokens = list(prompt)
        self._output = np.empty((0, len(model((0,)))), np.float32)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def forward(self, ids: Sequence[int], *, rows: int = 1) -> Float:
        assert 1 <= rows <= len(ids)
        self.tokens += ids
        if len(self._output) != rows:
            self._output = np.empty((rows, self._output.shape[1]), np.float32)
        ends = range(self.length - rows + 1, self.length + 1)
        self._output[:] = [self._model(tuple(self.tokens[:end])) for end in ends]
        return self._output

    def step(self, ids: Sequence[int]) -> Float:
        self.passes.append(len(ids))
        assert len(ids) <= self.reversible_room
        return self.forward(ids, rows=len(ids))

    @property
    def reversible_room(self) -> int:
        return self._capacity - self.length

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.tokens[length:]

    def logits(self) -> Float:
        return self._model(tuple(self.tokens))


def random_logits(tokens: tuple[int, ...]) -> Float:
    return np.asarray(np.random.default_rng(tokens).normal(size=VOCABULARY) * 3, np.float32)


def count_up(tokens: tuple[int, ...]) -> Float:
    """The next token is the last one plus 1."""
    return np.asarray(np.arange(VOCABULARY) == (tokens[-1] + 1) % VOCABULARY, np.float32)
