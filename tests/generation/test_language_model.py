"""Answers as they are written: pieces, cancelling, stop strings, full contexts, prefixes, threads."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Composer, Message, Request, Sampling, open_bundle
from edgecompose.cancellation import Cancellation
from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.engine.decoding.single import Single
from edgecompose.errors import Cancelled, GenerationError, PromptTooLong
from edgecompose.generation import language_model
from edgecompose.generation.drafts.example_tokens import example_tokens
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.timing import Timings
from tests.generation.models import PROMPTS


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of prompts were read at a time."""
    counts: list[int] = []
    run_alone = DecoderState.run_alone

    def counting(self: DecoderState, ids: Sequence[int], **settings: Any) -> Any:
        counts.extend([len(ids)] if settings["together"] else [])
        return run_alone(self, ids, **settings)

    monkeypatch.setattr(DecoderState, "run_alone", counting)
    return counts


def test_chunks_are_the_answer(opened: Composer) -> None:
    request = Request(max_tokens=20)
    with opened.generate(PROMPTS[0], request) as generation:
        assert generation.composition.retrieval.weights
        with pytest.raises(GenerationError, match="not complete"):
            _ = generation.answer
        chunks = list(generation)
    answer = opened.run(PROMPTS[0], request)
    assert "".join(chunks) == generation.answer.text == answer.text
    assert len(chunks) > 1 and all(chunks)
    assert (answer.finish, answer.generated_tokens, answer.dropped_tokens) == ("length", 20, 0)
    assert generation.answer.timings_ms["total"] >= generation.answer.timings_ms["decode"] > 0


def test_a_stop_string_ends_the_answer(opened: Composer) -> None:
    whole = opened.run(PROMPTS[2], Request(max_tokens=20)).text
    stop = whole[len(whole) // 2 :][:3]
    answer = opened.run(PROMPTS[2], Request(max_tokens=20, stop=(stop, "never")))
    assert answer.text == whole[: whole.find(stop)]
    assert answer.finish == "stop" and answer.generated_tokens < 20
    with pytest.raises(GenerationError, match="stop string is empty"):
        Request(stop=("a", ""))


def test_a_full_context_is_refused_or_shortened_by_choice(opened: Composer) -> None:
    context = opened.bundle.manifest.base.context
    long = " ".join(["the cat sat on a mat"] * context)
    weights = {"animals": 1.0}
    with pytest.raises(PromptTooLong, match=f"context of {context}"):
        opened.run(long, Request(weights=weights, max_tokens=5))
    answer = opened.run(long, Request(weights=weights, max_tokens=5, overflow="truncate", raw=True))
    whole = opened.model.tokenizer.encode(long)
    assert answer.prompt_tokens <= context - 5 and answer.prompt_tokens > context - 50
    assert answer.dropped_tokens == len(whole) - answer.prompt_tokens
    remaining = opened.model.tokenizer.decode(whole[answer.dropped_tokens :])
    assert opened.run(remaining, Request(weights=weights, max_tokens=5, raw=True)).text == answer.text
    for most in (context, 10 * context):  # an answer goes on to the context at most
        answer = opened.run("hello", Request(weights=weights, max_tokens=most, raw=True))
        written = answer.prompt_tokens + answer.generated_tokens
        assert written == context if answer.finish == "length" else written < context


def test_a_conversation_loses_its_oldest_turns_first(opened: Composer) -> None:
    context = opened.bundle.manifest.base.context
    turn = [Message("user", PROMPTS[0]), Message("assistant", PROMPTS[1])]
    talk = [Message("system", "be brief"), *turn * context, Message("user", PROMPTS[2])]
    request = Request(weights={}, max_tokens=4, overflow="truncate")
    answer = opened.run(talk, request)
    fits = [[talk[0], *turn * count, talk[-1]] for count in range(context // 16)]
    assert _length(opened, fits[-1]) > context
    remaining = max((f for f in fits if _length(opened, f) + 4 <= context), key=len)
    assert answer.prompt_tokens == _length(opened, remaining) and answer.dropped_tokens > 0
    assert opened.run(remaining, Request(weights={}, max_tokens=4)).text == answer.text


def _length(composer: Composer, talk: Sequence[Message]) -> int:
    tokenizer = composer.model.tokenizer
    return len(tokenizer.encode(tokenizer.chat([{"role": m.role, "content": m.content} for m in talk])))


def test_a_conversation_is_sent_in_the_chat_template(opened: Composer) -> None:
    talk = [Message("user", PROMPTS[0]), Message("assistant", "yes"), Message("user", PROMPTS[1])]
    assert opened.run(talk, Request(max_tokens=2)).prompt_tokens == _length(opened, talk)
    assert list(opened.retrieve(talk).distribution) == list(opened.retrieve(PROMPTS[1]).distribution)
    assert opened.retrieve(talk, Request(route_by="first")) == opened.retrieve(PROMPTS[0])
    with pytest.raises(GenerationError, match="cannot be sent raw"):
        opened.run(talk, Request(raw=True))


def test_a_chat_reads_only_passes_that_are_new(opened: Composer, read: list[int]) -> None:
    step = opened.model.decoder.start(opened.blends.blend({}, opened.default_merge, Timings()), 8).pass_tokens
    request = Request(weights={"animals": 1.0}, max_tokens=8, prompt_cache=True)
    talk = [Message("user", " ".join(PROMPTS * 4))]
    known = 0
    for prompt in PROMPTS:
        read.clear()
        answer = opened.run(talk, request)
        assert sum(read) == answer.prompt_tokens - known, "whole passes of the prompt before were not read again"
        known = answer.prompt_tokens // step * step
        assert known > 0
        assert answer.text == opened.run(talk, Request(weights={"animals": 1.0}, max_tokens=8)).text
        talk += [Message("assistant", answer.text), Message("user", prompt)]


def test_the_same_prompt_again_is_not_read_and_a_prefix_is_not_shared_between_blends(
    opened: Composer, read: list[int]
) -> None:
    texts = []
    for name, known in itertools.product(("animals", "colours"), (False, True)):
        read.clear()
        request = Request(weights={name: 1.0}, max_tokens=4, prompt_cache=True, raw=True)
        texts.append(opened.run(" ".join(PROMPTS), request).text)
        assert (not read) == known
    assert texts[0] == texts[1] and texts[2] == texts[3]


def test_a_prompt_is_read_a_pass_at_a_time_and_every_step_looks_at_the_flag(opened: Composer) -> None:
    cancellation = Cancellation()
    request = Request(weights={}, raw=True, max_tokens=8)
    long = " ".join(PROMPTS * 4)
    with opened.generate(long, request) as generation:
        steps = []
        while (chunk := generation.step()) is not None:
            steps.append(chunk)
        passes = next(i for i, step in enumerate(steps) if step.tokens or step.text)
        assert passes == -(-generation.answer.prompt_tokens // 128) - 1 > 0
    for count in range(passes + 3):
        cancellation = Cancellation()
        with opened.generate(long, request, cancellation=cancellation) as generation:
            for _ in range(count):
                assert generation.step() is not None
            cancellation.cancel()
            with pytest.raises(Cancelled):
                generation.step()
    cancellation.cancel()
    for start in (opened.generate, opened.compose):
        with pytest.raises(Cancelled):
            start(long, request, cancellation=cancellation)
    choices = Request(weights={}, choices=("yes", "no", "maybe"))
    with opened.generate(PROMPTS[0], choices) as scored:
        assert [len(step.text) > 0 for step in iter(scored.step, None)] == [False, False, False, True]


def test_logits_that_are_not_finite_are_an_error(opened: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Single.run
    monkeypatch.setattr(Single, "run", lambda *arguments, **options: run(*arguments, **options) * np.float32(np.nan))
    for request in (Request(max_tokens=3), Request(choices=("a", "b")), Request(sampling=Sampling())):
        with pytest.raises(GenerationError, match="logits are nan"):
            opened.run(PROMPTS[0], request)


def test_threads_get_what_one_gets(bundle: Path) -> None:
    requests = [
        (prompt, request)
        for prompt in PROMPTS
        for request in (
            Request(max_tokens=12),
            Request(max_tokens=12, sampling=Sampling(1.5, seed=3)),
            Request(weights={"animals": 0.5, "colours": -0.5}, max_tokens=12),
            Request(choices=("yes", "no", "maybe")),
        )
    ]
    with open_bundle(bundle, device="cpu") as composer:
        alone = [composer.run(*request) for request in requests]
    with open_bundle(bundle, device="cpu") as composer, ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda request: composer.run(*request), requests * 3))
    for result, expected in zip(together, alone * 3, strict=True):
        assert (result.text, result.choices, result.composition) == (
            expected.text,
            expected.choices,
            expected.composition,
        )
        assert result.retrieval == expected.retrieval


def test_scores_of_choices(opened: Composer) -> None:
    scores = opened.score(PROMPTS[0], ["yes", "no"])
    assert scores == opened.run(PROMPTS[0], Request(choices=("yes", "no"))).choices
    with pytest.raises(GenerationError, match="no choice"):
        opened.score(PROMPTS[0], [])


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=3)])
def test_drafts_change_how_an_answer_is_written_and_not_what(opened: Composer, sampling: Sampling | None) -> None:
    drafted = 0
    for prompt in PROMPTS:
        request = Request(max_tokens=60, sampling=sampling, raw=True)
        without = opened.run(prompt, dataclasses.replace(request, drafts=0))
        answer = opened.run(prompt, request)
        assert (answer.text, answer.finish, answer.generated_tokens) == (
            without.text,
            without.finish,
            without.generated_tokens,
        )
        assert without.drafted_tokens == without.accepted_tokens == 0 <= answer.accepted_tokens <= answer.drafted_tokens
        drafted += answer.drafted_tokens
    assert drafted or sampling is not None


def test_drafts_read_the_answers_of_examples_where_an_answer_may_be_long(
    opened: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[list[str], bool]] = []

    def noting(tokenizer: Tokenizer, answers: Iterable[str], *, raw: bool) -> Iterator[list[int]]:
        kept = list(answers)
        read.append((kept, raw))
        return example_tokens(tokenizer, kept, raw=raw)

    monkeypatch.setattr(language_model, "example_tokens", noting)
    for raw in (True, False):
        opened.run(PROMPTS[0], Request(max_tokens=9, raw=raw))
        (kept, form), *others = read
        assert set(kept) == {"yes"} and form == raw and not others
        read.clear()
    for request in (Request(max_tokens=4), Request(max_tokens=9, drafts=0), Request(choices=("yes", "no"))):
        opened.run(PROMPTS[0], request)
    assert not read, "an answer that is short, written without drafts or scored reads none"
