"""Draws the next token from logits.

The operations, their order and meaning are those of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from edgecompose.errors import GenerationError
from edgecompose.settings import Sampling

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
#: So many of the most likely tokens are sorted first; all of them only where these do not reach top-p.
_FIRST = 512


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
            token = greedy(logits)
        else:
            tokens, shares = candidates(logits, self._sampling)
            token = int(self._rng.choice(tokens, p=shares))
        if self._seen is not None:
            self._seen.add(token)
        return token


def greedy(logits: Float) -> int:
    """The token of the largest of `logits` (vocabulary,).

    Raises:
        GenerationError: one of them is no number, or infinite.
    """
    token = int(logits.argmax())  # that of a NaN where there is one
    require_finite(float(logits[token]))
    return token


def require_finite(value: float) -> None:
    """Make sure that what was computed from logits is a number.

    Raises:
        GenerationError: it is not finite, as the logits of a blend of enormous weights are.
    """
    if not math.isfinite(value):
        raise GenerationError(
            f"the model's logits are {value} under this blend; lower the weights of its adapters, or leave some out"
        )


def penalised(logits: Float, seen: Iterable[int], penalty: float) -> Float:
    """A copy of `logits` (vocabulary,) with those of `seen` ids made less likely where `penalty` is above 1."""
    changed = logits.copy()
    ids = np.fromiter(seen, np.intp)
    values = changed[ids]
    changed[ids] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
    return changed


def candidates(logits: Float, sampling: Sampling) -> tuple[Ids, Double]:
    """The tokens that may be drawn, most likely first, and their probabilities, which sum to 1.

    Args:
        logits: (vocabulary,).
        sampling: of a temperature above 0.

    Raises:
        GenerationError: the largest is not finite.
    """
    largest = logits.max()
    require_finite(float(largest))
    shifted = (logits - largest).astype(np.float64)
    with np.errstate(over="ignore"):  # a very low temperature: all but the largest vanish
        weights = np.exp(shifted / sampling.temperature)
    count = min(sampling.top_k or len(weights), len(weights))
    order = _largest(weights, min(count, _FIRST))
    total = weights.sum() if count == len(weights) else None
    if count > len(order) and (total is None or weights[order].sum() < sampling.top_p * total):
        order = _largest(weights, count)
    likely = weights[order]
    reached = np.cumsum(likely)
    cut = int(np.searchsorted(reached, sampling.top_p * (reached[-1] if total is None else total))) + 1
    likely = likely[:cut][likely[:cut] >= sampling.min_p * likely[0]]
    return order[: len(likely)], likely / likely.sum()


def _largest(weights: Double, count: int) -> Ids:
    """The `count` largest, largest first; equal ones by their ids."""
    chosen = np.arange(len(weights))
    if count < len(weights):
        chosen = np.sort(np.argpartition(-weights, count - 1)[:count])
    return np.asarray(chosen[np.argsort(-weights[chosen], kind="stable")], np.intp)
