"""Answers as streams and in batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Answer, Composer, Request, open_bundle
from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.engine.decoding.pass_queue import PassQueue
from edgecompose.errors import GenerationError, PromptTooLong
from tests.generation.models import PROMPTS


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of the model read."""
    counts: list[int] = []
    run = PassQueue._result

    def counting(self: PassQueue, job: Any) -> Any:
        counts.append(len(job.ids))
        return run(self, job)

    monkeypatch.setattr(PassQueue, "_result", counting)
    return counts


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


def test_an_answer_that_another_thread_closes_within_a_step_just_ends(
    opened: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing: list[threading.Thread] = []
    step = DecoderState.step

    def slow(self: DecoderState, ids: Sequence[int]) -> Any:
        if not closing:
            closing.append(threading.Thread(target=generation.close))
            closing[0].start()
            time.sleep(0.1)  # it waits for this step
        return step(self, ids)

    with opened.generate(PROMPTS[1], Request(max_tokens=20)) as generation:
        next(generation)
        monkeypatch.setattr(DecoderState, "step", slow)
        assert len(list(generation)) <= 1
        assert closing
        closing[0].join(10)


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
