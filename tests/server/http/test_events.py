"""Streams of events: comments while nothing comes, an error as the last event, an end when the client goes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from edgecompose.errors import ApiError, EdgeComposeError
from edgecompose.server.http.events import EventStream
from edgecompose.server.http.turns import Work
from edgecompose.server.responses import Json


def explain(error: Exception) -> EdgeComposeError:
    return error if isinstance(error, EdgeComposeError) else ApiError("internal", status=500)


class Reader:
    """A client of a stream, which goes away after some time."""

    def __init__(self, leaves_after: float = 60) -> None:
        self.sent: list[bytes] = []
        self._leaves_after = leaves_after

    async def receive(self) -> Any:
        await asyncio.sleep(self._leaves_after)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message.get("body", b""))

    async def read(self, work: Work[Json], *, seconds: float = 5) -> list[str]:
        stream = EventStream(work, work.coming(), explain=explain, seconds=seconds)
        scope: Any = {"type": "http"}
        await asyncio.wait_for(stream(scope, self.receive, self.send), 20)
        return b"".join(self.sent).decode().split("\n\n")[:-1]


async def two(work: Work[Json]) -> None:
    await work.put({"a": 1})
    await work.put({"b": "é"})


async def broken(work: Work[Json]) -> None:
    await work.put({"a": 1})
    raise ZeroDivisionError


async def endless(work: Work[Json]) -> None:
    await asyncio.sleep(60)


def test_events_and_the_end_mark() -> None:
    async def work() -> None:
        assert await Reader().read(Work(two)) == ['data: {"a":1}', 'data: {"b":"é"}', "data: [DONE]"]

    asyncio.run(work())


def test_an_error_is_the_last_event() -> None:
    async def work() -> None:
        lines = await Reader().read(Work(broken))
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "internal"
        assert lines[-1] == "data: [DONE]"

    asyncio.run(work())


def test_a_stream_that_waits_says_so_again_and_again_and_an_end_reaches_it() -> None:
    async def work() -> None:
        waiting = Work[Json](endless)
        asyncio.get_running_loop().call_later(0.3, waiting.end, ApiError("over", status=503))
        lines = await Reader().read(waiting, seconds=0.05)
        assert lines.count(": waiting") >= 3 and "over" in lines[-2] and lines[-1] == "data: [DONE]"

    asyncio.run(work())


def test_a_client_that_goes_ends_the_work() -> None:
    async def work() -> None:
        from starlette.requests import ClientDisconnect

        waiting = Work[Json](endless)
        with pytest.raises(ClientDisconnect):
            await Reader(leaves_after=0.05).read(waiting)
        await asyncio.wait([waiting.task], timeout=5)
        assert waiting.task.cancelled()

    asyncio.run(work())
