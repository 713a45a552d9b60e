"""Answers with drafts are those without, token for token, whatever is drafted and however they end."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.errors import GenerationError
from edgecompose.generation.decode import Chunk, decode
from edgecompose.generation.drafts.draft_length import DraftLength
from edgecompose.generation.drafts.drafter import Drafter
from edgecompose.generation.sampler import Sampler, greedy
from edgecompose.generation.stopping import AnswerText
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.settings import Sampling
from tests.factories import write_tokenizer
from tests.generation.fakes import VOCABULARY, FakeState, Float, Model, count_up, random_logits


class Noted:
    """Takes tokens as `AnswerText` does, and shows their ids; the text of one of them ends the answer."""

    def __init__(self, stop: int | None) -> None:
        self._stop, self.stopped = stop, False

    def push(self, token: int) -> str:
        self.stopped = token == self._stop
        return f"{token} "

    def finish(self) -> str:
        return "."


class Adversary:
    """Drafts what it likes: what greedy decoding would write, with wrong tokens among them."""

    def __init__(self, model: Model, prompt: Sequence[int], *, wrong: float, seed: int) -> None:
        self._model, self._tokens, self._wrong = model, list(prompt), wrong
        self._random = random.Random(seed)

    def append(self, token: int) -> None:
        self._tokens.append(token)

    def propose(self, room: int, *, beside: int) -> list[int]:
        guess: list[int] = []
        while len(guess) < self._random.randint(0, max(0, room)):
            right = int(self._model((*self._tokens, *guess)).argmax())
            guess.append(self._random.randrange(VOCABULARY) if self._random.random() < self._wrong else right)
        return guess


def fixed(tokens: int) -> float:
    """Costs of passes that do not depend on this machine."""
    return 1 + 0.1 * (tokens - 1)


def copying(tokens: tuple[int, ...]) -> Float:
    """Mostly goes on as after the last place of the last token, so that texts repeat themselves."""
    logits = random_logits(tokens[-3:])
    if tokens[-1] in tokens[:-1]:
        place = len(tokens) - 2 - tokens[-2::-1].index(tokens[-1])
        logits[tokens[place + 1]] += 3
    return logits


def fading(tokens: tuple[int, ...]) -> Float:
    """Logits that are no numbers beyond ten tokens."""
    return count_up(tokens) if len(tokens) < 10 else np.full(VOCABULARY, np.nan, np.float32)


@dataclass(frozen=True)
class Answer:
    """What an answer consists of, and the sequence that it leaves."""

    chunks: list[Chunk]
    tokens: list[int]


@dataclass(frozen=True)
class Case:
    """A model and how it is to answer."""

    model: Model = copying
    prompt: tuple[int, ...] = (1, 2, 3)
    max_tokens: int = 40
    end_tokens: tuple[int, ...] = ()
    stop: int | None = None
    sampling: Sampling | None = None
    closed_after: int | None = None

    def write(self, drafter: Callable[[], Drafter | None]) -> Answer:
        """The answer, up to where its reader leaves, as chunks without what was drafted."""
        fake = FakeState(self.model, self.prompt, capacity=len(self.prompt) + self.max_tokens - 1)
        draw = greedy if self.sampling is None else Sampler(self.sampling, self.prompt)
        logits, text = fake.logits(), cast(AnswerText, Noted(self.stop))
        generator = decode(
            cast(DecoderState, fake),
            logits,
            text,
            max_tokens=self.max_tokens,
            end_tokens=self.end_tokens,
            draw=draw,
            drafter=drafter(),
        )
        chunks = []
        for chunk in generator:
            chunks.append(dataclasses.replace(chunk, drafted=0, accepted=0))
            if len(chunks) == self.closed_after:
                generator.close()
        return Answer(chunks, fake.tokens)

    def adversary(self, wrong: float, seed: int) -> Drafter:
        return cast(Drafter, Adversary(self.model, self.prompt, wrong=wrong, seed=seed))

    def lookup(self, *examples: Sequence[int]) -> Drafter:
        return Drafter(self.prompt, most=8, length=DraftLength(fixed), examples=lambda: examples, end=self.end_tokens)


tokens = st.integers(0, VOCABULARY - 1)
samplings = st.none() | st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 99),
    top_k=st.sampled_from([0, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)
cases = st.builds(
    Case,
    model=st.sampled_from([copying, count_up, random_logits]),
    prompt=st.lists(tokens, min_size=2, max_size=12).map(tuple),
    max_tokens=st.integers(1, 40),
    end_tokens=st.lists(tokens, max_size=2).map(tuple),
    stop=st.none() | tokens,
    sampling=samplings,
    closed_after=st.none() | st.integers(1, 40),
)


@settings(max_examples=300, deadline=None)
@given(cases, st.sampled_from([0.0, 0.2, 0.7, 1.0]), st.integers(0, 99))
def test_whatever_is_drafted_the_answer_and_the_sequence_are_the_same(case: Case, wrong: float, seed: int) -> None:
    assert case.write(lambda: case.adversary(wrong, seed)) == case.write(lambda: None)


@settings(max_examples=200, deadline=None)
@given(cases, st.lists(st.lists(tokens, max_size=20), max_size=3))
def test_answers_with_looked_up_drafts_are_the_same(case: Case, examples: list[list[int]]) -> None:
    assert case.write(lambda: case.lookup(*examples)) == case.write(lambda: None)


def test_logits_that_are_no_numbers_end_an_answer_at_the_same_token() -> None:
    case = Case(model=fading)
    for drafter in (lambda: None, lambda: case.adversary(0.0, 1)):
        with pytest.raises(GenerationError, match="logits are nan"):
            case.write(drafter)


def test_samples_follow_the_distribution_with_wrong_and_right_drafts() -> None:
    shares = np.array([0.5, 0.3, 0.2] + [1e-30] * (VOCABULARY - 3), np.float32)
    case = Case(model=lambda tokens: np.log(shares), max_tokens=4000, sampling=Sampling(1.0, 1.0, seed=7))
    drawn = np.array(case.write(lambda: case.adversary(0.3, 1)).tokens[len(case.prompt) :])
    assert np.bincount(drawn, minlength=VOCABULARY)[:3] / len(drawn) == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    after = drawn[1:][drawn[:-1] == 0]  # independent of the token before, which a draft could have been right about
    assert np.bincount(after, minlength=VOCABULARY)[:3] / len(after) == pytest.approx([0.5, 0.3, 0.2], abs=0.05)


def _passes(case: Case, drafter: Drafter) -> tuple[list[int], list[Chunk]]:
    fake = FakeState(case.model, case.prompt)
    state, text = cast(DecoderState, fake), cast(AnswerText, Noted(None))
    written = decode(
        state, fake.logits(), text, max_tokens=case.max_tokens, end_tokens=case.end_tokens, drafter=drafter
    )
    return fake.passes, list(written)


def test_a_copy_takes_passes_of_eight_drafts_and_random_text_no_time() -> None:
    copy = Case(model=count_up, max_tokens=100)
    passes, chunks = _passes(copy, copy.lookup())
    assert max(passes) == 9 and len(passes) < 40
    assert passes.count(9) >= 5
    assert sum(chunk.tokens for chunk in chunks) == 100
    drafted, accepted = sum(chunk.drafted for chunk in chunks), sum(chunk.accepted for chunk in chunks)
    assert drafted == sum(passes) - len(passes)
    assert accepted == 100 - len(passes) - 1 <= drafted
    free = Case(model=random_logits, max_tokens=1000)
    passes, chunks = _passes(free, free.lookup())
    # nearly every token of twelve follows two that were seen
    assert sum(map(fixed, passes)) <= 1.03 * 999
    assert sum(chunk.accepted for chunk in chunks) == 1000 - len(passes) - 1


def test_an_answer_of_the_examples_is_written_in_few_passes() -> None:
    known = [*range(4, VOCABULARY), 0, 1, 2]
    case = Case(model=count_up, max_tokens=len(known), prompt=(3,))
    with_example, _ = _passes(case, case.lookup(known))
    without, _ = _passes(case, case.lookup())
    assert len(with_example) < len(without) == len(known) - 1


def test_a_pass_never_has_more_tokens_than_the_sequence_has_room_for() -> None:
    case = Case(model=count_up)
    fake = FakeState(case.model, case.prompt, capacity=30)
    state, text = cast(DecoderState, fake), cast(AnswerText, Noted(None))
    written = decode(state, fake.logits(), text, max_tokens=28, end_tokens=(), drafter=case.adversary(0.0, 3))
    assert sum(chunk.tokens for chunk in written) == 28
    assert fake.length == 30


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("stop", [(), ("\n\n",), ("two", "zzz"), ("o",), ("e\n\nt",)])
@pytest.mark.parametrize("most", [3, 9, 30])
def test_stop_strings_end_an_answer_within_a_draft(tokenizer: Tokenizer, stop: tuple[str, ...], most: int) -> None:
    ids = [*tokenizer.encode("one\n\ntwo one\n\ntwo"), *[tokenizer.encode("</s>")[0]] * 9]
    size = tokenizer.vocabulary_size

    def model(tokens: tuple[int, ...]) -> Float:
        return np.asarray(np.arange(size) == ids[min(len(tokens), len(ids)) - 1], np.float32)

    answers = []
    for wrong in (None, 0.0, 0.5):
        fake = FakeState(model, (1,))
        adversary = None if wrong is None else cast(Drafter, Adversary(model, (1,), wrong=wrong, seed=2))
        text = AnswerText(tokenizer, stop)
        state = cast(DecoderState, fake)
        chunks = decode(state, fake.logits(), text, max_tokens=most, end_tokens=(ids[-1],), drafter=adversary)
        answers.append(([(c.text, c.tokens, c.finish_reason) for c in chunks], fake.tokens))
    assert answers[0] == answers[1] == answers[2]
