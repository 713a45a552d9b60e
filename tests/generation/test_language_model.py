"""Answers as they are written: pieces, cancelling, stop strings, full contexts, prefixes, threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Answer, Chat, Composer, MergeSettings, Message, Request, Sampling, open_bundle
from edgecompose.engine.decoder_state import DecoderState
from edgecompose.errors import GenerationError, PromptTooLong

PROMPTS = ["the cat sat on a mat", "two and two is four", "grass grows green", "a dog barks at night and sleeps by day"]


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of the model read."""
    counts: list[int] = []
    forward = DecoderState.forward

    def counting(self: DecoderState, ids: Sequence[int], **settings: Any) -> Any:
        counts.append(len(ids))
        return forward(self, ids, **settings)

    monkeypatch.setattr(DecoderState, "forward", counting)
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


def test_an_answer_may_be_left_at_any_token(opened: Composer, read: list[int]) -> None:
    expected = opened.run(PROMPTS[1], Request(max_tokens=20)).text
    read.clear()
    with opened.generate(PROMPTS[1], Request(max_tokens=20)) as generation:
        next(generation)
    passes = len(read)
    assert passes < 20
    assert list(generation) == [] and len(read) == passes  # closed: nothing more is computed
    with pytest.raises(GenerationError, match="not complete"):
        _ = generation.answer
    assert opened.run(PROMPTS[1], Request(max_tokens=20)).text == expected


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
    for raw in (True, False):  # no prompt leaves room for such an answer
        with pytest.raises(PromptTooLong):
            opened.run("hello", Request(weights=weights, max_tokens=context, overflow="truncate", raw=raw))


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


def test_a_chat_reads_only_what_is_new(opened: Composer, read: list[int]) -> None:
    request = Request(weights={"animals": 1.0}, max_tokens=8, prompt_cache=True)
    talk: list[Message] = []
    plain: list[Message] = []
    for prompt in PROMPTS:
        talk.append(Message("user", prompt))
        plain.append(Message("user", prompt))
        read.clear()
        answer = opened.run(talk, request)
        first = read[0]
        assert (first < answer.prompt_tokens / 2) == (len(talk) > 3), "later turns go on from the one before"
        alone = opened.run(plain, Request(weights={"animals": 1.0}, max_tokens=8))
        assert answer.text == alone.text
        talk.append(Message("assistant", answer.text))
        plain.append(Message("assistant", alone.text))


def test_a_prefix_is_not_shared_between_blends(opened: Composer, read: list[int]) -> None:
    long = " ".join(PROMPTS)
    requests = [
        Request(weights={name: 1.0}, max_tokens=4, prompt_cache=True, raw=True) for name in ("animals", "colours")
    ]
    for request, known in itertools.product(requests, (False, True)):
        read.clear()
        opened.run(long, request)
        assert (read[0] == 1) == known


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


def test_a_batch_gives_each_prompt_what_it_gets_alone(opened: Composer) -> None:
    weights = [{"animals": 1.0}, {"numbers": 0.5, "animals": -0.5}, {}, None]
    choices = ("a cat", "two", "green grass")
    requests = [Request(weights=w, max_tokens=12) for w in weights] + [
        Request(weights=w, choices=choices) for w in weights
    ]
    prompts = [*PROMPTS, *PROMPTS]
    alone = [opened.run(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]
    for parallel in (1, 3, 8, None):
        result = list(opened.batch(prompts, requests, parallel=parallel))
        for one, other in zip(result, alone, strict=True):
            assert isinstance(one, Answer)
            assert (one.text, one.choices, one.composition) == (other.text, other.choices, other.composition)
    assert len({answer.composition for answer in alone}) >= 3
    (same,) = {tuple(a.text for a in opened.batch(PROMPTS) if isinstance(a, Answer)) for _ in range(2)}
    assert len(same) == len(PROMPTS)


def test_a_prompt_of_a_batch_that_fails_leaves_the_others_alone(opened: Composer) -> None:
    context = opened.bundle.manifest.base.context
    long = " ".join(["the cat"] * context)
    request = Request(weights={}, max_tokens=5)
    first, second, third = opened.batch([PROMPTS[0], long, PROMPTS[1]], request)
    assert isinstance(second, PromptTooLong)
    assert isinstance(first, Answer) and first.text == opened.run(PROMPTS[0], request).text
    assert isinstance(third, Answer) and third.text == opened.run(PROMPTS[1], request).text
    with pytest.raises(GenerationError, match="2 prompts and 1 requests"):
        opened.batch(PROMPTS[:2], [request])
    with pytest.raises(GenerationError, match="parallel is 0"):
        opened.batch(PROMPTS[:2], request, parallel=0)
    assert list(opened.batch([])) == []


def test_a_batch_that_is_left_ends_its_answers(opened: Composer, read: list[int]) -> None:
    answers = opened.batch([PROMPTS[0]] * 50, Request(weights={}, max_tokens=20), parallel=2)
    next(answers)
    answers.close()
    passes = len(read)
    assert passes < 50 * 20
    assert list(answers) == [] and len(read) == passes


class Interrupted:
    """A session that Ctrl-C stops before it has computed anything."""

    def run_with_iobinding(self, binding: object) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [2, 6])
def test_ctrl_c_inside_a_pass_leaves_a_cache_that_agrees_with_its_tokens(
    opened: Composer, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    session, run, passes = opened.model.decoder._session, DecoderState._pass, itertools.count(1)
    opened.model._prompts.clear()

    def interrupting(self: DecoderState, ids: Sequence[int], rows: int) -> Any:
        self._session = Interrupted() if next(passes) == interrupted else session
        return run(self, ids, rows)

    chat = Chat(opened, Request(weights={"animals": 1.0}, max_tokens=12))
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(DecoderState, "_pass", interrupting)
        chat.say(" ".join(PROMPTS))
    (cached,) = opened.model._prompts._states
    cached._session = session
    fresh = opened.model.decoder.start(opened.compose(PROMPTS[0], Request(weights={"animals": 1.0})).merged, 200)
    tokens = list(cached.tokens)
    np.testing.assert_allclose(cached.forward([7]), fresh.forward([*tokens, 7]), atol=1e-4)


def test_a_negative_token_id_is_named(opened: Composer) -> None:
    decoding = opened.model.decoder.start(opened.compose(PROMPTS[0]).merged, 8)
    with pytest.raises(GenerationError, match=r"token id -3 is outside"):
        decoding.forward([1, -3, 2])
    with pytest.raises(GenerationError, match=r"token id 300 is outside"):
        decoding.forward([1, 300, 2])


def test_one_adapter_is_one_blend_under_every_method_that_leaves_it_alone(opened: Composer) -> None:
    def composed(method: str, names: tuple[str, ...]) -> tuple[str, int]:
        weights = dict.fromkeys(names, 0.5)
        composition = opened.compose(PROMPTS[0], Request(weights=weights, merge=MergeSettings(method)))
        return composition.merged.digest, id(composition.merged)

    for methods in (("linear", "ties", "magnitude_prune", "dare_ties", "dare_linear"), ("product", "cat", "core_ties")):
        assert len({composed(method, ("animals",)) for method in methods}) == 1
        assert len({composed(method, ("animals", "colours")) for method in methods}) >= 2
    assert len({composed(method, ()) for method in ("linear", "ties", "svd", "product")}) == 1
