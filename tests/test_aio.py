"""Awaited answers are those that are not; cancelling stops the model."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import AsyncComposer, Request, open_bundle
from edgecompose.engine.decoding.pass_queue import PassQueue
from edgecompose.errors import PromptTooLong
from tests.fixtures_tiny import TASKS

PROMPTS = [prompts[0] for prompts in TASKS.values()]
REQUEST = Request(max_tokens=12)


def check(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@pytest.mark.parametrize("workers", [1, 4])
def test_answers_at_once_are_answers_alone(bundle: Path, workers: int) -> None:
    async def work() -> None:
        with open_bundle(bundle, device="cpu") as composer:
            alone = [composer.run(prompt, REQUEST).text for prompt in PROMPTS]
            async with AsyncComposer(composer, workers=workers) as aio:
                answers = await asyncio.gather(*(aio.run(prompt, REQUEST) for prompt in PROMPTS * 2))
                assert [answer.text for answer in answers] == alone * 2
                assert await aio.retrieve(PROMPTS[0]) == composer.retrieve(PROMPTS[0])
                assert (await aio.compose(PROMPTS[0])).merged.digest == composer.compose(PROMPTS[0]).merged.digest
                assert await aio.score(PROMPTS[0], ["a", "b"]) == composer.score(PROMPTS[0], ["a", "b"])

    check(work())


def test_chunks_come_one_by_one_and_leaving_stops_the_model(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    run = PassQueue._result

    def counting(self: PassQueue, job: Any) -> Any:
        passes.append(len(job.ids))
        return run(self, job)

    monkeypatch.setattr(PassQueue, "_result", counting)

    async def work() -> None:
        with open_bundle(bundle, device="cpu") as composer:
            expected = composer.run(PROMPTS[0], REQUEST).text
            async with AsyncComposer(composer) as aio:
                async with await aio.generate(PROMPTS[0], REQUEST) as generation:
                    chunks = [chunk async for chunk in generation]
                assert "".join(chunks) == expected == generation.answer.text and len(chunks) > 1
                passes.clear()
                async with await aio.generate(PROMPTS[0], REQUEST) as generation:
                    await anext(generation)
                assert len(passes) < 12
                assert generation.composition.retrieval.weights

    check(work())


def test_who_is_cancelled_leaves_a_model_that_stopped(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on, passes = threading.Event(), threading.Event(), []
    run = PassQueue._result

    def slow(self: PassQueue, job: Any) -> Any:
        passes.append(len(job.ids))
        entered.set()
        assert go_on.wait(30)
        return run(self, job)

    async def work() -> None:
        with open_bundle(bundle, device="cpu") as composer:
            expected = composer.run(PROMPTS[0], REQUEST).text
            async with AsyncComposer(composer) as aio:
                monkeypatch.setattr(PassQueue, "_result", slow)
                task = asyncio.create_task(aio.run(PROMPTS[0], REQUEST))
                await asyncio.to_thread(entered.wait, 30)
                task.cancel()
                go_on.set()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert len(passes) <= 2
                assert (await aio.run(PROMPTS[0], REQUEST)).text == expected

    check(work())


def test_errors_are_those_of_the_composer(bundle: Path) -> None:
    async def work() -> None:
        with open_bundle(bundle, device="cpu") as composer:
            async with AsyncComposer(composer) as aio:
                with pytest.raises(PromptTooLong):
                    await aio.run("x " * 2000)

    check(work())


def test_what_fails_after_its_caller_was_cancelled_twice_is_reported_to_nobody(bundle: Path) -> None:
    begun, go_on, reports = threading.Event(), threading.Event(), []

    def fail() -> None:
        begun.set()
        go_on.wait(30)
        raise PromptTooLong("late")

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context["message"]))
        with open_bundle(bundle, device="cpu") as composer:
            async with AsyncComposer(composer) as aio:
                call = asyncio.create_task(aio.call(fail))
                await asyncio.to_thread(begun.wait, 30)
                for _ in range(2):
                    call.cancel()
                    await asyncio.sleep(0.05)
                assert call.cancelled()
                go_on.set()
                del call
                await asyncio.sleep(0.3)
                gc.collect()

    check(work())
    assert reports == []
