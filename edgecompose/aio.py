"""Async wrapper of Composer: model calls run in threads."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from edgecompose.cancellation import Cancellation
from edgecompose.closing import AsyncClosing
from edgecompose.composer import Composer
from edgecompose.generation.decode import Chunk
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
        cancellation = Cancellation()
        begin = functools.partial(self.composer.generate, prompt, request, cancellation=cancellation)
        return AsyncGeneration(await self.call(begin, cancellation), self, cancellation)

    async def call(self, work: Callable[[], T], cancellation: Cancellation | None = None) -> T:
        """Run a function in one of the threads, in the order of the calls.

        A caller that is cancelled waits until the function has ended, so nothing is released while a thread works on
        it.

        Args:
            cancellation: ends the function within, where the caller is cancelled.
        """
        job = self._threads.submit(work)
        ended = asyncio.wrap_future(job)
        ended.add_done_callback(_retrieve)  # a caller that is cancelled, even twice, does not read it
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            if cancellation is not None:
                cancellation.cancel()
            if not job.cancel():
                await asyncio.wait([ended])
            raise


def _retrieve(ended: asyncio.Future[T]) -> None:
    """Look at a result, so that asyncio does not report an exception that nobody reads."""
    if not ended.cancelled():
        ended.exception()


class AsyncGeneration(AsyncClosing):
    """An answer in progress, as `Generation`."""

    def __init__(self, generation: Generation, owner: AsyncComposer, cancellation: Cancellation) -> None:
        self.composition = generation.composition
        self._generation, self._owner, self._cancellation = generation, owner, cancellation

    def __aiter__(self) -> AsyncGeneration:
        return self

    async def __anext__(self) -> str:
        while (chunk := await self.step()) is not None:
            if chunk.text:
                return chunk.text
        raise StopAsyncIteration

    async def step(self) -> Chunk | None:
        """As `Generation.step`: a bounded step in one of the threads, so that several answers take turns."""
        return await self._owner.call(self._generation.step, self._cancellation)

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
