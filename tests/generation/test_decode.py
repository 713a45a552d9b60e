"""Decoding loops over a model of a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgecompose.engine.decoder import Decoding
from edgecompose.errors import GenerationError
from edgecompose.generation.decode import Finish, StopStrings, generate, log_softmax, score_choices, stream_text
from edgecompose.generation.sampler import Sampler, likeliest
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.settings import Sampling
from tests.factories import write_tokenizer

Float = npt.NDArray[np.float32]
Model = Callable[[tuple[int, ...]], Float]
VOCABULARY = 12


class FakeDecoding:
    """A sequence whose logits are a function of all its tokens; like the real one it reuses its output."""

    def __init__(self, model: Model, prompt: Sequence[int] = (1, 2, 3)) -> None:
        self._model = model
        self.tokens = list(prompt)
        self._output = np.empty((0, len(model((0,)))), np.float32)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def forward(self, ids: Sequence[int], *, kept: int = 1) -> Float:
        assert 1 <= kept <= len(ids)
        self.tokens += ids
        if len(self._output) != kept:
            self._output = np.empty((kept, self._output.shape[1]), np.float32)
        ends = range(self.length - kept + 1, self.length + 1)
        self._output[:] = [self._model(tuple(self.tokens[:end])) for end in ends]
        return self._output

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.tokens[length:]

    def logits(self) -> Float:
        return self._model(tuple(self.tokens))


def _random(tokens: tuple[int, ...]) -> Float:
    return np.asarray(np.random.default_rng(tokens).normal(size=VOCABULARY) * 3, np.float32)


def _count_up(tokens: tuple[int, ...]) -> Float:
    """The next token is the last one plus 1."""
    return np.asarray(np.arange(VOCABULARY) == (tokens[-1] + 1) % VOCABULARY, np.float32)


def _generate(
    fake: FakeDecoding, *, max_tokens: int = 20, end_tokens: Sequence[int] = (), sampling: Sampling | None = None
) -> Iterator[int]:
    decoding = cast(Decoding, fake)
    draw = likeliest if sampling is None else Sampler(sampling, fake.tokens)
    return generate(decoding, fake.logits(), max_tokens=max_tokens, end_tokens=end_tokens, draw=draw)


def _ends(ids: Sequence[int], finish: Finish = "length") -> Generator[int, None, Finish]:
    yield from ids
    return finish


def _score(fake: FakeDecoding, choices: Sequence[Sequence[int]]) -> list[float]:
    return score_choices(cast(Decoding, fake), fake.logits(), choices)


def _draws(logits: Float, count: int, sampling: Sampling) -> npt.NDArray[np.int64]:
    return np.array(list(_generate(FakeDecoding(lambda tokens: logits), max_tokens=count, sampling=sampling)))


@given(arrays.arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32)), st.floats(-1000, 1000, width=16))
def test_log_softmax_is_a_distribution_and_ignores_a_shift(logits: Float, shift: float) -> None:
    found = log_softmax(logits)
    assert found.dtype == np.float32
    assert np.exp(found.astype(np.float64)).sum(axis=-1) == pytest.approx(1, abs=1e-5)
    assert np.diff(found) == pytest.approx(np.diff(logits), abs=1e-4)
    assert log_softmax(logits + np.float32(shift)) == pytest.approx(found, abs=1e-2)


def test_log_softmax_does_not_overflow() -> None:
    assert log_softmax(np.array([1e30, -1e30, 1e30], np.float32))[[0, 2]] == pytest.approx(-np.log(2))
    assert log_softmax(np.array([0, -np.inf], np.float32)).tolist() == [0, -np.inf]


def test_greedy_decoding_stops_before_an_end_token() -> None:
    fake = FakeDecoding(_count_up)
    assert list(_generate(fake, end_tokens=(9, 7))) == [4, 5, 6]
    assert fake.tokens == [1, 2, 3, 4, 5, 6]


def test_an_end_token_at_once_is_an_empty_answer() -> None:
    assert list(_generate(FakeDecoding(_count_up), end_tokens=(4,))) == []


@pytest.mark.parametrize("count", [1, 2, 5])
def test_decoding_stops_at_max_tokens_without_a_pass_for_nothing(count: int) -> None:
    fake = FakeDecoding(_count_up)
    assert list(_generate(fake, max_tokens=count)) == [4, 5, 6, 7, 8][:count]
    assert fake.length == 3 + count - 1


def test_greedy_decoding_takes_the_largest_logit_after_each_prefix() -> None:
    tokens = list(_generate(FakeDecoding(_random), max_tokens=8))
    assert tokens == [int(_random((1, 2, 3, *tokens[:i])).argmax()) for i in range(8)]


def test_a_seed_makes_sampling_reproducible() -> None:
    answers = [
        list(_generate(FakeDecoding(_random), sampling=Sampling(temperature=2.0, seed=seed))) for seed in (5, 5, 6)
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


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -1.0), ("top_k", -1), ("min_p", -0.1), ("min_p", 1.1), ("min_p", np.nan),
        ("repetition_penalty", 0.0), ("repetition_penalty", np.inf), ("repetition_penalty", np.nan),
        ("temperature", np.inf), ("temperature", np.nan),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", np.nan), ("seed", -1),
    ],
)  # fmt: skip
def test_bad_sampling_settings_are_refused(setting: str, value: float) -> None:
    with pytest.raises(GenerationError, match="expected"):
        Sampling(**{setting: value})  # type: ignore[arg-type]


def test_a_choice_scores_its_mean_log_likelihood_and_leaves_no_trace() -> None:
    fake = FakeDecoding(_random)
    choices = [[4], [4, 5, 6], [0, 11], [4, 5, 6, 7, 8]]
    naive = []
    for choice in choices:
        rows = [log_softmax(_random((1, 2, 3, *choice[:i])))[token] for i, token in enumerate(choice)]
        naive.append(float(np.mean(rows)))
    assert _score(fake, choices) == pytest.approx(naive, abs=1e-5)
    assert fake.tokens == [1, 2, 3]


def test_logits_in_the_buffer_of_the_sequence_are_scored_as_they_were() -> None:
    fake = FakeDecoding(_random, ())
    buffer = fake.forward([1, 2, 3])[0]  # one row, as the second choice makes the sequence write again
    scores = score_choices(cast(Decoding, fake), buffer, [[4, 5], [4, 5]])
    assert scores[0] == scores[1] == pytest.approx(_score(FakeDecoding(_random), [[4, 5]])[0])


def test_an_empty_choice_is_refused_before_anything_runs() -> None:
    fake = FakeDecoding(_random)
    with pytest.raises(GenerationError, match="empty choice"):
        _score(fake, [[4, 5], []])
    assert fake.tokens == [1, 2, 3]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "👩‍👩‍👧 ok", "a\ufffdb", "e\u0301"])
def test_a_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    pieces = list(stream_text(_ends(ids), tokenizer))
    assert [token for token, _ in pieces] == ids
    assert "".join(piece for _, piece in pieces) == text
    assert "\ufffd" in text or all("\ufffd" not in piece for _, piece in pieces)


def test_text_is_shown_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    pieces = [piece for _, piece in stream_text(_ends(tokenizer.encode("aé日")), tokenizer)]
    assert pieces == ["a", "", "é", "", "", "日"]


def test_what_was_held_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a日")[:-1]
    assert list(stream_text(_ends(ids), tokenizer)) == [(ids[0], "a"), (ids[1], ""), (ids[2], ""), (-1, "\ufffd")]


def test_leading_white_space_is_dropped_and_no_other(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" \n\t a b \n")
    pieces = list(stream_text(_ends(ids), tokenizer))
    assert "".join(piece for _, piece in pieces) == "a b \n"
    assert [token for token, _ in pieces] == ids
    assert list(stream_text(_ends(tokenizer.encode("  ")), tokenizer)) == [(ids[0], ""), (ids[0], "")]


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a</s>b")
    assert len(ids) == 3
    assert "".join(piece for _, piece in stream_text(_ends(ids), tokenizer)) == "ab"


def _text(pieces: Generator[tuple[int, str], None, Finish]) -> tuple[list[str], Finish]:
    shown = []
    while True:
        try:
            shown.append(next(pieces)[1])
        except StopIteration as ended:
            return shown, ended.value


def test_why_an_answer_ended() -> None:
    def finish(**settings: Any) -> Finish:
        tokens = _generate(FakeDecoding(_count_up), **settings)
        while True:
            try:
                next(tokens)
            except StopIteration as ended:
                return cast(Finish, ended.value)

    assert finish(end_tokens=(6,), max_tokens=3) == "stop"
    assert finish(end_tokens=(7,), max_tokens=3) == "length"  # the end would have been the next token


@given(
    st.text("ab\nc", max_size=12), st.lists(st.text("ab\nc", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 3), min_size=12, max_size=12),
)  # fmt: skip
def test_stop_strings_cut_where_the_whole_text_would_be_cut(text: str, stop: list[str], sizes: list[int]) -> None:
    guard, shown, rest = StopStrings(stop), "", text
    found = False
    for size in sizes:
        piece, rest = rest[:size], rest[size:]
        part, found = guard.push(piece)
        shown += part
        assert text.startswith(shown)
        if found:
            break
    shown += "" if found else guard.finish()
    # the first that is complete ends the answer, as it would if every character came by itself
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert found == bool(ends)
    if not found:
        assert shown == text
    else:
        assert not any(s in shown for s in stop)
        assert any(text.startswith(shown + s) for s in stop)


def test_an_answer_ends_before_a_stop_string_and_the_model_stops_too(tokenizer: Tokenizer) -> None:
    drawn = []

    def tokens() -> Generator[int, None, Finish]:
        for token in tokenizer.encode("one\n\ntwo"):
            drawn.append(token)
            yield token
        return "length"

    pieces, finish = _text(stream_text(tokens(), tokenizer, ["\n\n", "zzz"]))
    assert ("".join(pieces), finish) == ("one", "stop")
    assert len(drawn) == len("one\n\n")
    assert pieces == ["o", "n", "e", "", ""]  # a line end may be the first half of two


def test_what_a_stop_string_held_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    assert _text(stream_text(_ends(tokenizer.encode("one\n")), tokenizer, ["\n\n"])) == (
        ["o", "n", "e", "", "\n"], "length",
    )  # fmt: skip
    assert _text(stream_text(_ends(tokenizer.encode(" é")[:2], "stop"), tokenizer, ["é"])) == (
        ["", "", "\ufffd"],
        "stop",
    )
