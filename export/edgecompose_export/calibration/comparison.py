"""Distances between the next-token distributions of two models, computed in chunks of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecompose_export.calibration.logits import scaled_logits, vocabulary_chunks
from edgecompose_export.weights.blocks import Float
from edgecompose_export.weights.places import EMBEDDING, HEAD
from edgecompose_export.weights.source import WeightSource


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Two models on the same positions.

    Attributes:
        kl: mean KL divergence of the second from the first, in nats.
        top1: share of positions where both have the same most likely token.
        nll: mean negative log-likelihood of the next token under the first, in nats.
        nll_other: the same under the second.
        positions: number of positions.
    """

    kl: float
    top1: float
    nll: float
    nll_other: float
    positions: int


def compare(one: Iterable[Float], other: Iterable[Float], following: Sequence[int]) -> Comparison:
    """Compare the distributions of two models over the vocabulary.

    Args:
        one, other: chunks (n, c) of logits, in the order of token ids.
        following: for each of the n positions the id of the next token, -1 where there is none.
    """
    targets = np.asarray(following)
    sums = [_Running(len(targets)), _Running(len(targets))]
    cross = np.zeros(len(targets))
    reference = np.full(len(targets), -np.inf)
    start = 0
    for p, q in zip(one, other, strict=True):
        # sum of exp(p) (p - q), relative to the largest p so far
        top = np.maximum(reference, p.max(-1))
        cross = cross * np.exp(reference - top) + (np.exp(p - top[:, None]) * (p - q)).sum(-1, dtype=np.float64)
        reference = top
        for running, logits in zip(sums, (p, q), strict=True):
            running.add(logits, start, targets)
        start += p.shape[1]
    first, second = sums
    kl = cross / np.exp(first.log_total - reference) - first.log_total + second.log_total
    has_next = targets >= 0
    return Comparison(
        kl=float(kl.mean()),
        top1=float((first.best == second.best).mean()),
        nll=first.loss(has_next),
        nll_other=second.loss(has_next),
        positions=len(targets),
    )


def divergences(source: WeightSource, reference: Float, others: Float) -> npt.NDArray[np.float64]:
    """Mean KL divergence (nats) of the next-token distributions of several models from that of the reference.

    Args:
        reference: inputs (n, hidden) of the output layer.
        others: (models, n, hidden).
    """
    models, count, hidden = others.shape
    flat = others.reshape(-1, hidden)
    targets = np.full(count, -1)
    sums = [_Running(count) for _ in range(models + 1)]
    cross, top = np.zeros((models, count)), np.full(count, -np.inf)
    tensor = EMBEDDING if source.config.tied else HEAD
    for start, stop in vocabulary_chunks(source.config, len(flat)):
        rows = source.floats(tensor, start, stop).T
        p, q = (scaled_logits(source.config, states @ rows) for states in (reference, flat))
        raised = np.maximum(top, p.max(-1))
        weights = np.exp(p - raised[:, None])
        for i, logits in enumerate(q.reshape(models, count, -1)):
            cross[i] = cross[i] * np.exp(top - raised) + (weights * (p - logits)).sum(-1, dtype=np.float64)
            sums[i].add(logits, 0, targets)
        sums[-1].add(p, 0, targets)
        top = raised
    own = sums[-1].log_total
    totals = np.stack([running.log_total for running in sums[:-1]])
    return np.asarray((cross / np.exp(own - top) - own + totals).mean(-1))


class _Running:
    """Log of the sum of exponentials, most likely token, and logit of the target, over chunks of a vocabulary."""

    def __init__(self, count: int) -> None:
        self.best = np.zeros(count, np.int64)
        self._top = np.full(count, -np.inf)
        self._sum = np.zeros(count)
        self._target = np.zeros(count)

    def add(self, logits: Float, start: int, targets: npt.NDArray[np.int64]) -> None:
        top = np.maximum(self._top, logits.max(-1))
        self.best = np.where(top > self._top, logits.argmax(-1) + start, self.best)
        self._sum = self._sum * np.exp(self._top - top) + np.exp(logits - top[:, None]).sum(-1, dtype=np.float64)
        self._top = top
        inside = np.flatnonzero((targets >= start) & (targets < start + logits.shape[1]))
        self._target[inside] = logits[inside, targets[inside] - start]

    @property
    def log_total(self) -> npt.NDArray[np.float64]:
        return self._top + np.log(self._sum)

    def loss(self, has_next: npt.NDArray[np.bool_]) -> float:
        return float((self.log_total - self._target)[has_next].mean()) if has_next.any() else 0.0
