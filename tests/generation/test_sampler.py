"""Draws against transformers' own processors, and what they must hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompose.errors import GenerationError
from edgecompose.generation.sampler import Sampler, candidates, greedy, penalised
from edgecompose.settings import Sampling

Float = npt.NDArray[np.float32]


def _logits(seed: int, size: int = 2000, scale: float = 4) -> Float:
    return np.asarray(np.random.default_rng(seed).normal(size=size) * scale, np.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.floats(0.2, 3),
    st.sampled_from([0, 1, 7, 600, 5000]),
    st.sampled_from([1.0, 0.9, 0.3, 1e-3]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([1.0, 1.3, 0.8]),
)
def test_the_distribution_is_that_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    torch = pytest.importorskip("torch", reason="a package of edgecompose-export")
    transformers = pytest.importorskip("transformers.generation.logits_process")
    logits, seen = _logits(seed), np.random.default_rng(seed).integers(0, 2000, 50)
    scores = torch.tensor(logits[None].astype(np.float64))
    steps = [
        transformers.RepetitionPenaltyLogitsProcessor(penalty),
        transformers.TemperatureLogitsWarper(temperature),
        *([transformers.TopKLogitsWarper(top_k)] if top_k else []),
        transformers.TopPLogitsWarper(top_p),
        transformers.MinPLogitsWarper(min_p),
    ]
    for step in steps:
        scores = step(torch.tensor(seen[None]), scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    sampling = Sampling(
        temperature=temperature, top_p=top_p, seed=0, top_k=top_k, min_p=min_p, repetition_penalty=penalty
    )
    remaining, shares = candidates(penalised(logits, set(seen.tolist()), penalty), sampling)
    result = np.zeros(len(logits))
    result[remaining] = shares
    differ = np.flatnonzero((result > 0) != (expected > 0))
    if len(differ):  # rounding: one token at the very border of top-p or min-p, and tokens too unlikely to count
        mass = np.maximum(result, expected)[differ]
        border = differ[mass.argmax()]
        assert mass.sum() - mass.max() < 1e-9
        assert max(result[border], expected[border]) <= shares.min() * (1 + 1e-6)
        result[border], expected[border] = 0, 0
        result, expected = result / result.sum(), expected / expected.sum()
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(shares) <= 0).all()


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draw = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=7))
    counts = np.bincount([draw(logits) for _ in range(4000)], minlength=4)
    expected = np.array([2000, 1200, 600, 200])
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert len({tuple(Sampler(Sampling(seed=seed))(logits) for _ in range(1)) for seed in range(50)}) > 1


def test_a_penalty_leaves_the_logits_of_the_sequence_as_they_were() -> None:
    logits = np.array([2, -2, 1], np.float32)
    assert penalised(logits, {0, 1}, 2).tolist() == [1, -4, 1]
    assert logits.tolist() == [2, -2, 1]


def test_what_was_drawn_is_less_likely_afterwards() -> None:
    logits = np.array([1.0, 0.9, 0.8], np.float32)
    draw = Sampler(Sampling(temperature=0, repetition_penalty=1.5), seen=[0])
    assert [draw(logits) for _ in range(3)] == [1, 2, 0]
    assert [Sampler(Sampling(temperature=0))(logits) for _ in range(3)] == [0, 0, 0]


def test_draws_do_not_depend_on_how_many_tokens_were_sorted_first() -> None:
    flat = _logits(1, 49_152, 0.1)  # no 512 tokens reach 0.9 here
    remaining, shares = candidates(flat, Sampling(1.0, 0.9))
    weights = np.exp((flat - flat.max()).astype(np.float64))
    order = np.argsort(-weights, kind="stable")
    expected = order[: int(np.searchsorted(np.cumsum(weights[order]), 0.9 * weights.sum())) + 1]
    np.testing.assert_array_equal(remaining, expected)
    assert shares == pytest.approx(weights[expected] / weights[expected].sum())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = np.array([1, bad, 2], np.float32)
    for draw in (greedy, Sampler(Sampling()), Sampler(Sampling(temperature=0, repetition_penalty=2))):
        with pytest.raises(GenerationError, match=r"logits are (nan|inf) under this blend; lower the weights"):
            draw(logits)
    with pytest.raises(GenerationError, match="logits are nan"):
        draw(np.full(3, np.nan, np.float32))
    with pytest.raises(GenerationError, match="logits are -inf"):
        greedy(np.full(3, -np.inf, np.float32))


def test_without_a_seed_draws_differ() -> None:
    flat = np.zeros(1000, np.float32)
    draws = [
        tuple(draw(flat) for _ in range(8)) for draw in (Sampler(Sampling(seed=seed)) for seed in (None, None, 7, 7))
    ]
    assert draws[0] != draws[1] and draws[2] == draws[3]
