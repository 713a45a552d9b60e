"""Computes what requests ask for: each in its turn, and none after the server has ended or its client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from edgecompose.aio import AsyncComposer, AsyncGeneration
from edgecompose.bundle.manifest import MANIFEST_FILE
from edgecompose.cancellation import Cancellation
from edgecompose.closing import AsyncClosing
from edgecompose.composer import Composer
from edgecompose.errors import ApiError, BundleError, EdgeComposeError
from edgecompose.request import Answer, Composition
from edgecompose.server import endpoints, protocol, responses
from edgecompose.server.config import ServerSettings
from edgecompose.server.endpoints import Endpoint
from edgecompose.server.http.metrics import Metrics
from edgecompose.server.http.turns import Place, Turns, Work
from edgecompose.server.protocol import ApiCall
from edgecompose.server.responses import Json

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
#: Seconds after which a request whose reader does not keep up gives its place to another.
_PATIENCE = 0.5
#: Share of the grace that answers in progress get to end by themselves.
_SHARE = 0.6


class Answers(AsyncClosing):
    """The work of a server, in the threads of its composer."""

    def __init__(self, composer: Composer, settings: ServerSettings, metrics: Metrics) -> None:
        self._composer, self._settings, self._metrics = composer, settings, metrics
        self._aio = AsyncComposer(composer, workers=settings.threads)
        self._turns = Turns(settings.active, settings.queue, threads=settings.threads, count=metrics.waiting.inc)
        self._work: set[Work[Any]] = set()
        self.ending = False
        self.created = 0

    async def load(self) -> None:
        """Load all models."""
        self.created = int((self._composer.bundle.root / MANIFEST_FILE).stat().st_mtime)
        await self._aio.call(self._composer.warm_up)

    async def close(self) -> None:
        """Wait for what still runs in the threads, then end them."""
        await self._aio.close()

    def begin(self, produce: Callable[[Work[T]], Awaitable[None]]) -> Work[T]:
        """Start work that ends with the server.

        Raises:
            ApiError: the server is ending.
        """
        if self.ending:
            raise _ending()
        work: Work[T] = Work(produce)
        self._work.add(work)
        work.task.add_done_callback(lambda _: self._work.discard(work))
        return work

    def answer(self, endpoint: Endpoint, body: object) -> tuple[Work[Json], bool]:
        """Start what an endpoint of the table computes; its values are the response, or the events of a stream.

        Returns:
            The work, and whether it is a stream.

        Raises:
            ApiError: the call is malformed, or the server is ending.
        """
        limits = self._settings.calls
        if not isinstance(endpoint.action, str):
            begin = endpoint.action(self._composer, body, limits)
            return self.begin(lambda work: self._compute(work, begin)), False
        call = protocol.call_of(self._composer, endpoint.action, body, limits, aliases=self._settings.aliases)
        produce = self._stream if call.stream else self._respond
        return self.begin(lambda work: produce(work, call)), call.stream

    def explain(self, error: Exception) -> EdgeComposeError:
        """An error of ours of whatever was raised; one that is none of ours gets a line in the log."""
        if isinstance(error, (BundleError, OSError)) and self._composer.bundle.changed:
            return responses.bundle_changed(error)
        if isinstance(error, EdgeComposeError):
            return error
        frame = traceback.extract_tb(error.__traceback__)[-1:]
        place = f" at {frame[0].name}:{frame[0].lineno}" if frame else ""
        _LOG.error("internal error%s: %s: %.300r", place, type(error).__name__, str(error))
        _LOG.debug("its traceback", exc_info=error)
        return ApiError(
            f"internal error ({type(error).__name__}); the log of the server says more",
            code="internal_error",
            status=500,
        )

    async def end(self, hurry: asyncio.Event) -> None:
        """Refuse what waits, and what is not finished after a part of the grace, or at once when `hurry` is set."""
        self.ending = True
        for work in list(self._work):
            if work.waits:
                work.end(_ending())
        for task in asyncio.as_completed([self._quiet(), hurry.wait()], timeout=_SHARE * self._settings.grace_seconds):
            with contextlib.suppress(TimeoutError):
                await task
            break
        for work in list(self._work):
            work.end(_ending())

    async def _quiet(self) -> None:
        """Wait until no work is left."""
        while self._work:
            await asyncio.wait({work.task for work in self._work})

    async def _respond(self, work: Work[Json], call: ApiCall) -> None:
        answers = []
        async with self._turns.admitted(work) as place:
            for prompt in call.prompts:
                async with await self._aio.generate(prompt, call.request) as generation:
                    answers.append(await self._write(generation, place, _unseen))
        name = responses.new_id(call.kind)
        await work.put(responses.response(call, answers, name, changed=self._composer.bundle.changed))

    async def _stream(self, work: Work[Json], call: ApiCall) -> None:
        answers, name = list[Answer](), responses.new_id(call.kind)
        async with self._turns.admitted(work) as place:
            for index, prompt in enumerate(call.prompts):
                events = _Events(work, place, call, name, index)
                async with await self._aio.generate(prompt, call.request) as generation:
                    await events.first(generation.composition)
                    answers.append(await self._write(generation, place, events.text))
                await events.last(answers[-1], changed=self._composer.bundle.changed)
        if call.usage:
            await work.put(responses.usage_chunk(call, name, answers))

    async def _compute(self, work: Work[Json], begin: endpoints.Work) -> None:
        cancellation = Cancellation()
        async with self._turns.admitted(work) as place:
            steps = begin(cancellation)
            while (result := await self._aio.call(lambda: endpoints.next_step(steps), cancellation)) is None:
                await place.pass_turn()
        await work.put(result)

    async def _write(self, generation: AsyncGeneration, place: Place, show: Callable[[str], Awaitable[None]]) -> Answer:
        """The whole answer, token by token; others have their turns between them."""
        tokens = 0
        try:
            while (chunk := await generation.step()) is not None:
                tokens += chunk.tokens
                if chunk.text:
                    await show(chunk.text)
                await place.pass_turn()
        except BaseException:
            self._metrics.aborted(tokens)
            raise
        self._metrics.answered(generation.answer)
        return generation.answer


class _Events:
    """Gives the chunks of one answer to its reader."""

    def __init__(self, work: Work[Json], place: Place, call: ApiCall, name: str, index: int) -> None:
        self._work, self._place, self._call, self._name, self._index = work, place, call, name, index

    async def first(self, composition: Composition) -> None:
        """Give what is known before the first token."""
        await self._put(responses.first_chunk(self._call, self._name, composition, index=self._index))

    async def text(self, text: str) -> None:
        """Give a part of the text."""
        await self._put(responses.chunk(self._call, self._name, text, index=self._index))

    async def last(self, answer: Answer, *, changed: bool) -> None:
        """Give the last chunk."""
        await self._put(responses.last_chunk(self._call, self._name, answer, index=self._index, changed=changed))

    async def _put(self, event: Json) -> None:
        if not self._work.unread:
            await self._work.put(event)
            return
        async with self._place.idle():
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._work.put(event)
            except TimeoutError:  # the reader does not keep up
                self._place.leave_idle()
                await self._work.put(event)


async def _unseen(text: str) -> None:
    """Show nothing of an answer before it is whole."""


def _ending() -> ApiError:
    return ApiError("the server is ending; send the request again later", code="server_ending", status=503)
