"""Bodies of requests: their size, their time, their form."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request as HttpRequest

from edgecompose.errors import ApiError
from edgecompose.server.http.body import read_body


class Client:
    """Sends parts of a body, with pauses before some."""

    def __init__(self, *parts: bytes, pause: float = 0, kind: str = "application/json", **headers: str) -> None:
        self.parts, self.pause, self.read = list(parts), pause, 0
        sent = {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
        encoded = [(name.encode(), value.encode()) for name, value in sent.items()]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": encoded, "query_string": b""}
        self.http = HttpRequest(scope, self.receive)

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(self.pause)
        body = self.parts.pop(0) if self.parts else b""
        self.read += len(body)
        return {"type": "http.request", "body": body, "more_body": bool(self.parts)}

    def body(self, limit: int = 100, seconds: float = 5) -> Any:
        return asyncio.run(read_body(self.http, limit, seconds))

    def refusal(self, limit: int = 100, seconds: float = 5) -> ApiError:
        with pytest.raises(ApiError) as raised:
            self.body(limit, seconds)
        return raised.value


def test_a_body_in_parts_is_one() -> None:
    assert Client(b'{"a"', b": [1", b"]}").body() == {"a": [1]}
    long = ["x" * 1000] * 200
    assert Client(json.dumps(long).encode(), kind="Application/JSON; charset=utf-8").body(limit=1 << 20) == long


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_what_is_not_said_to_be_json_is_refused_unread(kind: str) -> None:
    client = Client(b"{}", kind=kind)
    assert client.refusal().status == 415 and not client.read


def test_a_large_body_is_read_to_its_end_and_dropped_so_that_its_sender_reads_the_answer() -> None:
    client = Client(*[b" " * 90] * 50)
    error = client.refusal()
    assert (error.status, error.code, client.read) == (413, "too_large", 4500)


def test_who_waits_for_leave_to_send_too_much_gets_none() -> None:
    client = Client(b" " * 500, content_length="500", expect="100-continue")
    assert client.refusal().status == 413 and not client.read
    assert Client(b"{}", content_length="2", expect="100-continue").body() == {}


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    error = Client(b"{", b"}", pause=0.2).refusal(seconds=0.1)
    assert (error.status, error.code) == (408, "timeout")
