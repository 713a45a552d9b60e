"""The decoding loop over a model of a few tokens: what it draws, when it ends, and what chunks it gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.generation.decode import Chunk, decode
from edgecompose.generation.sampler import Sampler, greedy
from edgecompose.generation.stopping import AnswerText
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.settings import Sampling
from tests.factories import write_tokenizer
from tests.generation.fakes import FakeState, Float, count_up, random_logits


class Tokens:
    """Takes tokens as `AnswerText` does, and keeps them as they are."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.stopped = False

    def push(self, token: int) -> str:
        self.tokens.append(token)
        return "x"

    def finish(self) -> str:
        return ""


def _generate(
    fake: FakeState, *, max_tokens: int = 20, end_tokens: Sequence[int] = (), sampling: Sampling | None = None
) -> list[int]:
    draw = greedy if sampling is None else Sampler(sampling, fake.tokens)
    text = Tokens()
    state, answer = cast(DecoderState, fake), cast(AnswerText, text)
    chunks = list(decode(state, fake.logits(), answer, max_tokens=max_tokens, end_tokens=end_tokens, draw=draw))
    assert sum(chunk.tokens for chunk in chunks) == len(text.tokens)
    assert [chunk.finish_reason is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    return text.tokens


def _draws(logits: Float, count: int, sampling: Sampling) -> npt.NDArray[np.int64]:
    return np.array(_generate(FakeState(lambda tokens: logits), max_tokens=count, sampling=sampling))


def test_greedy_decoding_stops_before_an_end_token() -> None:
    fake = FakeState(count_up)
    assert (_generate(fake, end_tokens=(9, 7))) == [4, 5, 6]
    assert fake.tokens == [1, 2, 3, 4, 5, 6]


def test_an_end_token_at_once_is_an_empty_answer() -> None:
    assert (_generate(FakeState(count_up), end_tokens=(4,))) == []


@pytest.mark.parametrize("count", [1, 2, 5])
def test_decoding_stops_at_max_tokens_without_a_pass_for_nothing(count: int) -> None:
    fake = FakeState(count_up)
    assert (_generate(fake, max_tokens=count)) == [4, 5, 6, 7, 8][:count]
    assert fake.length == 3 + count - 1


def test_greedy_decoding_takes_the_largest_logit_after_each_prefix() -> None:
    tokens = _generate(FakeState(random_logits), max_tokens=8)
    assert tokens == [int(random_logits((1, 2, 3, *tokens[:i])).argmax()) for i in range(8)]


def test_a_seed_makes_sampling_reproducible() -> None:
    answers = [
        (_generate(FakeState(random_logits), sampling=Sampling(temperature=2.0, seed=seed))) for seed in (5, 5, 6)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_sampling_follows_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    shares = np.bincount(_draws(logits, 4000, Sampling(1.0, 1.0)), minlength=3) / 4000
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.01, {1}), (0.5, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_draws_from_the_smallest_set_that_reaches_it(top_p: float, allowed: set[int]) -> None:
    logits = np.log(np.array([0.1, 0.501, 0.1, 0.3], np.float32))
    assert set(_draws(logits, 300, Sampling(1.0, top_p)).tolist()) == allowed


@pytest.mark.parametrize("temperature", [0, 1e-3, 1e-30, 1e-40, 1e-60])
def test_a_low_temperature_is_greedy(temperature: float) -> None:
    logits = np.array([1, 10, 9, -30], np.float32)
    assert set(_draws(logits, 20, Sampling(temperature, 1.0)).tolist()) == {1}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path / "tokenizer.json"))


def _chunks(tokenizer: Tokenizer, text: str, stop: Sequence[str] = (), **settings: Any) -> list[Chunk]:
    """The chunks of a model that writes this text and then a line of special tokens."""
    ids = [*tokenizer.encode(text), *[tokenizer.encode("</s>")[0]] * 9]
    size = tokenizer.vocabulary_size
    fake = FakeState(lambda tokens: np.asarray(np.arange(size) == ids[len(tokens) - 1], np.float32), (1,))
    answer = AnswerText(tokenizer, stop)
    chosen: dict[str, Any] = {"max_tokens": len(ids), "end_tokens": (ids[-1],)} | settings
    return list(decode(cast(DecoderState, fake), fake.logits(), answer, **chosen))


def test_the_last_chunk_tells_why_the_answer_ended(tokenizer: Tokenizer) -> None:
    assert _chunks(tokenizer, "ab") == [Chunk("a", 1), Chunk("b", 1), Chunk("", 0, "stop")]
    assert _chunks(tokenizer, "ab", max_tokens=2) == [Chunk("a", 1), Chunk("b", 1, "length")]
    assert _chunks(tokenizer, "a b c", ["b "]) == [Chunk("a", 1), Chunk(" ", 1), Chunk("", 1), Chunk("", 1, "stop")]
    assert _chunks(tokenizer, "a\n", ["\n\n"], max_tokens=2) == [Chunk("a", 1), Chunk("\n", 1, "length")]


def test_a_stop_string_ends_the_model_too(tokenizer: Tokenizer) -> None:
    chunks = _chunks(tokenizer, "one\n\ntwo", ["\n\n", "zzz"])
    assert "".join(chunk.text for chunk in chunks) == "one"
    assert sum(chunk.tokens for chunk in chunks) == len("one\n\n")
    assert chunks[-1].finish_reason == "stop"
