"""Draws the next token from logits; pure of models and text.

The operations, their order and meaning are those of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecompose.errors import GenerationError

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
#: So many of the likeliest tokens are sorted first; all of them only where these do not reach top-p.
_FIRST = 512


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn.

    `temperature` >= 0 divides the logits, 0 takes the likeliest token. `top_k` >= 0 keeps the k likeliest, 0 all;
    `top_p` in (0, 1] the fewest whose probabilities reach p; `min_p` in [0, 1] those at least that times as likely as
    the likeliest (arXiv 2407.01082). `repetition_penalty` > 0 divides the positive logits of tokens that were read or
    written before, and multiplies the negative ones (arXiv 1909.05858); 1 changes nothing. `seed` makes draws
    reproducible.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        ranges: tuple[tuple[str, float, bool, str], ...] = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or a positive number"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "a number in [0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
            (
                "repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"),
                "a positive number",
            ),
        )  # fmt: skip
        for name, found, fits, wanted in ranges:
            if not fits:
                raise GenerationError(f"sampling {name} is {found}; {wanted} is wanted")


class Sampler:
    """Draws tokens one after another; holds the state of the random numbers and the tokens that were seen.

    Args:
        seen: ids of the prompt, which the repetition penalty counts as repeated.
    """

    def __init__(self, sampling: Sampling, seen: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)
        self._seen = set(seen) if sampling.repetition_penalty != 1 else None

    def __call__(self, logits: Float) -> int:
        """The next token's id.

        Args:
            logits: (vocabulary,), left as they are.
        """
        if self._seen is not None:
            logits = penalised(logits, self._seen, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            token = likeliest(logits)
        else:
            kept, shares = candidates(logits, self._sampling)
            token = int(self._rng.choice(kept, p=shares))
        if self._seen is not None:
            self._seen.add(token)
        return token


def likeliest(logits: Float) -> int:
    """The token of the largest of `logits` (vocabulary,)."""
    return int(logits.argmax())


def penalised(logits: Float, seen: Iterable[int], penalty: float) -> Float:
    """A copy of `logits` (vocabulary,) with those of `seen` ids made less likely where `penalty` is above 1."""
    changed = logits.copy()
    ids = np.fromiter(seen, np.intp)
    found = changed[ids]
    changed[ids] = np.where(found > 0, found / np.float32(penalty), found * np.float32(penalty))
    return changed


def candidates(logits: Float, sampling: Sampling) -> tuple[Ids, Double]:
    """The tokens that may be drawn, likeliest first, and their probabilities, which sum to 1.

    Args:
        logits: (vocabulary,), of which at least one is finite.
        sampling: of a temperature above 0.
    """
    shifted = (logits - logits.max()).astype(np.float64)
    with np.errstate(over="ignore"):  # a very low temperature: all but the largest vanish
        weights = np.exp(shifted / sampling.temperature)
    count = min(sampling.top_k or len(weights), len(weights))
    order = _largest(weights, min(count, _FIRST))
    total = weights.sum() if count == len(weights) else None
    if count > len(order) and (total is None or weights[order].sum() < sampling.top_p * total):
        order = _largest(weights, count)
    kept = weights[order]
    reached = np.cumsum(kept)
    cut = int(np.searchsorted(reached, sampling.top_p * (reached[-1] if total is None else total))) + 1
    kept = kept[:cut][kept[:cut] >= sampling.min_p * kept[0]]
    return order[: len(kept)], kept / kept.sum()


def _largest(weights: Double, count: int) -> Ids:
    """The `count` largest, largest first; equal ones by their ids."""
    chosen = np.arange(len(weights))
    if count < len(weights):
        chosen = np.sort(np.argpartition(-weights, count - 1)[:count])
    return np.asarray(chosen[np.argsort(-weights[chosen], kind="stable")], np.intp)
