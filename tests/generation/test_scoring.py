"""Likelihoods of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.errors import GenerationError
from edgecompose.generation.scoring import log_softmax, score_choices
from tests.generation.fakes import FakeState, Float, random_logits


def _score(fake: FakeState, choices: Sequence[Sequence[int]]) -> list[float]:
    return list(score_choices(cast(DecoderState, fake), fake.logits(), choices))


@given(arrays.arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32)), st.floats(-1000, 1000, width=16))
def test_log_softmax_is_a_distribution_and_ignores_a_shift(logits: Float, shift: float) -> None:
    result = log_softmax(logits)
    assert result.dtype == np.float32
    assert np.exp(result.astype(np.float64)).sum(axis=-1) == pytest.approx(1, abs=1e-5)
    assert np.diff(result) == pytest.approx(np.diff(logits), abs=1e-4)
    assert log_softmax(logits + np.float32(shift)) == pytest.approx(result, abs=1e-2)


def test_log_softmax_does_not_overflow() -> None:
    assert log_softmax(np.array([1e30, -1e30, 1e30], np.float32))[[0, 2]] == pytest.approx(-np.log(2))
    assert log_softmax(np.array([0, -np.inf], np.float32)).tolist() == [0, -np.inf]


def test_a_choice_scores_its_mean_log_likelihood_and_leaves_no_trace() -> None:
    fake = FakeState(random_logits)
    choices = [[4], [4, 5, 6], [0, 11], [4, 5, 6, 7, 8]]
    naive = []
    for choice in choices:
        rows = [log_softmax(random_logits((1, 2, 3, *choice[:i])))[token] for i, token in enumerate(choice)]
        naive.append(float(np.mean(rows)))
    assert _score(fake, choices) == pytest.approx(naive, abs=1e-5)
    assert fake.tokens == [1, 2, 3]


def test_logits_in_the_buffer_of_the_sequence_are_scored_as_they_were() -> None:
    fake = FakeState(random_logits, ())
    buffer = fake.forward([1, 2, 3])[0]  # one row, as the second choice makes the sequence write again
    scores = list(score_choices(cast(DecoderState, fake), buffer, [[4, 5], [4, 5]]))
    assert scores[0] == scores[1] == pytest.approx(_score(FakeState(random_logits), [[4, 5]])[0])


def test_an_empty_choice_is_refused_before_anything_runs() -> None:
    fake = FakeState(random_logits)
    with pytest.raises(GenerationError, match="empty choice"):
        _score(fake, [[4, 5], []])
    assert fake.tokens == [1, 2, 3]
