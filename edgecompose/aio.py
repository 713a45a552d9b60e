"""Async wrapper of Composer: model calls run in threads."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from edgecompose.closing import AsyncClosing
from edgecompose.composer import Composer
from edgecompose.generation.messages import Prompt
from edgecompose.request import Answer, Composition, Request
from edgecompose.retrieval.retriever import Retrieval
from edgecompose.streaming import Generation

T = TypeVar("T")


class AsyncComposer(AsyncClosing):
    """A composer whose methods are awaited; it lets go of its threads when it is closed, the composer stays open.

    Args:
        workers: answers that are written at once; more of them wait for their turn.
    """

    def __init__(self, composer: Composer, *, workers: int = 1) -> None:
        self.composer = composer
        self._threads = ThreadPoolExecutor(workers, "edgecompose")

    async def close(self) -> None:
        """Wait for what is being computed, then let go of the threads."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def retrieve(self, prompt: Prompt, request: Request | None = None) -> Retrieval:
        """As `Composer.retrieve`."""
        return await self.call(functools.partial(self.composer.retrieve, prompt, request))

    async def compose(self, prompt: Prompt, request: Request | None = None) -> Composition:
        """As `Composer.compose`."""
        return await self.call(functools.partial(self.composer.compose, prompt, request))

    async def score(self, prompt: Prompt, choices: Sequence[str], request: Request | None = None) -> dict[str, float]:
        """As `Composer.score`."""
        return await self.call(functools.partial(self.composer.score, prompt, choices, request))

    async def run(self, prompt: Prompt, request: Request | None = None) -> Answer:
        """As `Composer.run`; being cancelled ends the answer at the token it is at."""
        async with await self.generate(prompt, request) as generation:
            async for _ in generation:
                pass
            return generation.answer

    async def generate(self, prompt: Prompt, request: Request | None = None) -> AsyncGeneration:
        """As `Composer.generate`: compose the blend, and give an asynchronous iterator over the answer.

        Use it in an `async with` block, which ends the answer when it is left.
        """
        started = await self.call(functools.partial(self.composer.generate, prompt, request))
        return AsyncGeneration(started, self)

    async def call(self, work: Callable[[], T]) -> T:
        """Do something in one of the threads; whoever is cancelled meanwhile waits until it is done.

        So what a thread works on is never let go of while it does.
        """
        task = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancel():
                await asyncio.wait([task])
            raise


class AsyncGeneration(AsyncClosing):
    """An answer that is being written, as `composer.Generation`."""

    def __init__(self, generation: Generation, owner: AsyncComposer) -> None:
        self.composition = generation.composition
        self._generation, self._owner = generation, owner

    def __aiter__(self) -> AsyncGeneration:
        return self

    async def __anext__(self) -> str:
        text = await self._owner.call(lambda: next(self._generation, None))
        if text is None:
            raise StopAsyncIteration
        return text

    async def close(self) -> None:
        """Stop, wherever the answer is; returns when the model has stopped."""
        await asyncio.to_thread(self._generation.close)

    @property
    def answer(self) -> Answer:
        """The whole answer and how it came about.

        Raises:
            GenerationError: it was not written to its end.
        """
        return self._generation.answer
