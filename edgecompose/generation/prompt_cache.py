"""The prompt cache: sequences that were read, reused by prompts with the same beginning.

A prompt is read in passes of a fixed number of tokens, and a reused one has to get the very keys and values that it
would get alone: a pass of few tokens is computed by other kernels than one of many, and rounding to 8 bits makes that
visible in the answer. So what is reused are whole passes of the prompt, and, for the same prompt again, all of it with
its logits; never the tokens of an answer, which were computed one by one. `take_behind` is for reading those again
while nobody waits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecompose.engine.decoding.decoder_state import DecoderState

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class CachedPrompt:
    """A sequence whose first `length` tokens were read in whole passes.

    Attributes:
        tokens: all that were read and written, of which a longer prompt may begin with more.
        logits: (vocabulary,), those after the first `length`, where these are a prompt; None elsewhere.
    """

    state: DecoderState
    length: int
    tokens: Sequence[int]
    logits: Float | None

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of `ids` have the keys and values that reading them alone would give."""
        common = common_prefix(self.tokens[: self.length], ids)
        if self.logits is not None and common == len(ids) == self.length:
            return common
        step = self.state.pass_tokens
        return min(common, len(ids) - 1) // step * step

    @property
    def read_passes(self) -> int:
        """Whole passes that were read."""
        return self.length // self.state.pass_tokens

    def read_pass(self) -> CachedPrompt:
        """Read the next whole pass of `tokens` as a prompt's."""
        step, start = self.state.pass_tokens, self.read_passes * self.state.pass_tokens
        self.state.rewind(start)
        self.state.forward(self.tokens[start : start + step])
        return CachedPrompt(self.state, start + step, self.tokens, None)


class PromptCache:
    """The last `limit` prompts. Safe between threads; a sequence that was taken belongs to its taker."""

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._prompts: list[CachedPrompt] = []
        self._lock = threading.Lock()

    def take(self, composition: str, ids: Sequence[int]) -> tuple[DecoderState, Float | None] | None:
        """The sequence under the same blend of which most can be reused, rewound to that; None where nothing can.

        The logits after `ids` come with it where it has read them all.

        Args:
            composition: the content hash of the blend.
        """
        with self._lock:
            fitting = [prompt for prompt in self._prompts if prompt.state.composition == composition]
            best = max(fitting, key=lambda prompt: prompt.reusable(ids), default=None)
            count = 0 if best is None else best.reusable(ids)
            if best is None or not count:
                return None
            self._prompts.remove(best)
        best.state.rewind(count)
        return best.state, best.logits if count == len(ids) else None

    def take_behind(self) -> CachedPrompt | None:
        """The latest prompt with whole passes that were written and not read; None where there is none."""
        with self._lock:
            behind = (p for p in self._prompts if len(p.tokens) // p.state.pass_tokens > p.read_passes)
            prompt = next(behind, None)
            self._prompts = [other for other in self._prompts if other is not prompt]
            return prompt

    def put(self, prompt: CachedPrompt) -> None:
        """Store a prompt with its sequence, which may have gone on with an answer."""
        with self._lock:
            self._prompts = [prompt, *self._prompts][: self._limit]

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._prompts = []


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens at the beginning of two sequences that are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
