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
    """A composer whose methods are awaited. Closing it ends its threads; the composer stays open.

    Args:
        workers: concurrent answers; more of them wait.
    """

    def __init__(self, composer: Composer, *, workers: int = 1) -> None:
        self.composer = composer
        self._threads = ThreadPoolExecutor(workers, "edgecompose")

    async def close(self) -> None:
        """Wait for running calls, then end the threads."""
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
        """As `Composer.run`; cancelling it stops at the present token."""
        async with await self.generate(prompt, request) as generation:
            async for _ in generation:
                pass
            return generation.answer

    async def generate(self, prompt: Prompt, request: Request | None = None) -> AsyncGeneration:
        """As `Composer.generate`: compose the blend, and return an asynchronous iterator over the answer.

        Leaving its `async with` block stops the answer.
        """
        started = await self.call(functools.partial(self.composer.generate, prompt, request))
        return AsyncGeneration(started, self)

    async def call(self, work: Callable[[], T]) -> T:
        """Run a function in one of the threads. A caller that is cancelled waits until the function has ended.

        So nothing is released while a thread works on it.
        """
        task = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancel():
                await asyncio.wait([task])
            raise


class AsyncGeneration(AsyncClosing):
    """An answer in progress, as `Generation`."""

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
        """The whole answer and how it was computed.

        Raises:
            GenerationError: it was not read to its end.
        """
        return self._generation.answer
