"""The prompt cache: sequences that were read, reused by prompts with the same beginning.

A prompt is read in passes of a fixed number of tokens, and a reused one has to get the very keys and values that it
would get alone: a pass of few tokens is computed by other kernels than one of many, and rounding to 8 bits makes that
visible in the answer. So what is reused are whole passes of the prompt, and, for the same prompt again, all of it with
its logits; never the tokens of an answer, which were computed one by one. `take_behind` is for reading those again
while nobody waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.engine.decoding.saved_prompt import SavedPrompt

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
        return _reusable(self.tokens[: self.length], ids, step=self.state.pass_tokens, whole=self.logits is not None)

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
        self._saved: list[SavedPrompt] = []
        self._step = 1
        self._lock = threading.Lock()

    def take(
        self, composition: str, ids: Sequence[int], start: Callable[[], DecoderState]
    ) -> tuple[DecoderState, Float | None] | None:
        """The sequence under the same blend of which most can be reused, rewound to that; None where nothing can.

        The logits after `ids` come with it where it has read them all.

        Args:
            composition: the content hash of the blend.
            start: begins a sequence under the blend, for a prompt that was saved.
        """
        saved, saved_count = self._best_saved(composition, ids)
        with self._lock:
            fitting = [prompt for prompt in self._prompts if prompt.state.composition == composition]
            best = max(fitting, key=lambda prompt: prompt.reusable(ids), default=None)
            count = 0 if best is None else best.reusable(ids)
            if best is None or not count or saved_count > count:
                best = None
            else:
                self._prompts.remove(best)
        if best is None:
            return None if saved is None else _restored(saved, saved_count, ids, start())
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
            self._prompts, self._saved = [], []

    def load(self, prompts: Sequence[SavedPrompt], *, pass_tokens: int) -> None:
        """Reuse prompts that were saved, too.

        Args:
            pass_tokens: tokens of a whole pass.
        """
        with self._lock:
            self._saved, self._step = list(prompts), pass_tokens

    def save(self, limit: int) -> list[SavedPrompt]:
        """Prompts to be saved, the last used first, of at most `limit` bytes together.

        What was not used since it was loaded stays behind what was, and leaves first. No prompt may be in use.
        """
        with self._lock:
            prompts = [*filter(None, map(_saved, self._prompts)), *self._saved]
        chosen: list[SavedPrompt] = []
        for prompt in prompts:
            twice = any(p.composition == prompt.composition and p.tokens == prompt.tokens for p in chosen)
            if not twice and sum(p.bytes for p in chosen) + prompt.bytes <= limit:
                chosen.append(prompt)
        return chosen

    def _best_saved(self, composition: str, ids: Sequence[int]) -> tuple[SavedPrompt | None, int]:
        """The saved prompt of which most can be reused, and how many tokens; it counts as the last used."""
        with self._lock:
            counts = [
                _reusable(saved.tokens, ids, step=self._step, whole=saved.logits is not None)
                if saved.composition == composition
                else 0
                for saved in self._saved
            ]
            count = max(counts, default=0)
            if not count:
                return None, 0
            saved = self._saved.pop(counts.index(count))
            self._saved.insert(0, saved)
            return saved, count


def _reusable(tokens: Sequence[int], ids: Sequence[int], *, step: int, whole: bool) -> int:
    """How many of `ids` have the keys and values that reading them alone would give, where `tokens` were read.

    Args:
        step: tokens of a whole pass.
        whole: whether the logits after `tokens` are known.
    """
    common = common_prefix(tokens, ids)
    return common if whole and common == len(ids) == len(tokens) else min(common, len(ids) - 1) // step * step


def _saved(prompt: CachedPrompt) -> SavedPrompt | None:
    """A prompt as arrays; None where it cannot be saved."""
    cache = prompt.state.save(prompt.length) if prompt.length else None
    if cache is None:
        return None
    return SavedPrompt(prompt.state.composition, list(prompt.tokens[: prompt.length]), cache, prompt.logits)


def _restored(
    saved: SavedPrompt, count: int, ids: Sequence[int], state: DecoderState
) -> tuple[DecoderState, Float | None]:
    """A sequence with the first `count` tokens of a saved prompt, and the logits after `ids` where these are all."""
    state.restore(saved.tokens[:count], saved.cache[:, :, :count])
    return state, saved.logits if count == len(ids) else None


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens at the beginning of two sequences that are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
