"""Answers as server-sent events, with comments while an answer is still to come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgecompose.errors import EdgeComposeError
from edgecompose.server import responses
from edgecompose.server.http.turns import Work
from edgecompose.server.json_text import to_bytes
from edgecompose.server.responses import Json

#: Name in the state of a request that says that it is answered by events, between which a comment may stand.
EVENTS = "events"
_DONE = b"data: [DONE]\n\n"
_WAITING = b": waiting\n\n"


class EventStream(Response):
    """A response of events. An error is the last of them, before the end mark.

    Args:
        first: waits for the first event.
        explain: makes an error of ours of whatever ended the work.
        seconds: between comments while no event comes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        work: Work[Json],
        first: asyncio.Task[Json | None],
        *,
        explain: Callable[[Exception], EdgeComposeError],
        seconds: float,
    ) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})  # a proxy such as nginx would hold events back
        del self.headers["content-length"]
        self._work, self._first, self._explain, self._seconds = work, first, explain, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a client that disconnects ends the work at once."""

        async def send_bytes(data: bytes, *, last: bool = False) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": not last})

        scope.setdefault("state", {})[EVENTS] = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with watched(receive) as gone:
            try:
                await self._send_events(send_bytes, gone)
                await send_bytes(_DONE, last=True)
            finally:
                self._work.end()

    async def _send_events(self, send: Callable[[bytes], Awaitable[None]], gone: asyncio.Task[None]) -> None:
        coming = self._first
        if not coming.done():
            await send(_WAITING)
        try:
            while True:
                await asyncio.wait({coming, gone}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise ClientDisconnect
                if not coming.done():
                    await send(_WAITING)
                    continue
                event = coming.result()
                if event is None:
                    return
                await send(_event(event))
                coming = self._work.coming()
        except ClientDisconnect:
            raise
        except Exception as error:
            await send(_event(responses.error_json(self._explain(error))))
        finally:
            coming.cancel()


@contextlib.asynccontextmanager
async def watched(receive: Receive) -> AsyncIterator[asyncio.Task[None]]:
    """A task that is done when the client has disconnected; the body of the request has to be read already."""
    task = asyncio.create_task(_until_gone(receive))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(event: Json) -> bytes:
    return b"data: " + to_bytes(event) + b"\n\n"
