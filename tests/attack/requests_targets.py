"""Targets of the server: the bytes of HTTP connections, and lines of JSON-RPC.

All of the server is the product's own; only the models behind it are replaced, by ones that answer at once.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import http.client
import io
import json
import logging
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgecompose.bundle.files import Bundle
from edgecompose.cancellation import Cancellation
from edgecompose.composer import Composer
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import ApiError, PromptTooLong
from edgecompose.generation.decode import Chunk
from edgecompose.generation.messages import Prompt, conversation, query_text
from edgecompose.request import Composition, Request
from edgecompose.server.config import ServerSettings
from edgecompose.server.http.app import create_app
from edgecompose.server.http.connection import Connection
from edgecompose.server.http.serving import Server
from edgecompose.server.jsonrpc import INTERNAL, bounded_lines
from edgecompose.server.stdio import StdioServer
from edgecompose.settings import MergeSettings
from edgecompose.streaming import Generation
from tests.attack.mutations import mutate_bytes, mutate_json_text
from tests.attack.target import Target
from tests.factories import write_bundle
from tests.factories_answers import ANSWER, RETRIEVAL

ORIGIN = "http://tool.example"
SETTINGS = ServerSettings(
    origins=(ORIGIN,), body_bytes=64 << 10, idle_seconds=2, header_seconds=2, body_seconds=2, first_seconds=0.05
)
_USER = {"role": "user", "content": "hello"}
_TALK = [{"role": "system", "content": "be brief"}, _USER, {"role": "assistant", "content": None}, _USER]
_OWN = {"neighbours": 3, "method": "ties", "density": 0.5, "route_by": "first", "exclude": ["alpha"], "choices": ["a"]}
#: Bodies that are answered, by path.
CALLS: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", {"model": "auto", "messages": [_USER], "max_tokens": 3}),
    ("/v1/chat/completions", {"model": "base", "messages": _TALK, "stream": True, "temperature": 0.7, "seed": 5}),
    ("/v1/chat/completions", {"messages": [_USER], "stop": ["a", "b"], "top_k": -1, "top_p": 0, "edgecompose": _OWN}),
    ("/v1/chat/completions", {"messages": [_USER], "adapters": {"one": 0.5}, "tools": [], "n": 1, "user": "me"}),
    ("/v1/chat/completions", {"messages": [{**_USER, "content": [{"type": "text", "text": "hi"}]}]}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": -1, "stream": True}),
    ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}, "repetition_penalty": 1.1}),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("/v1/compose", {"messages": [_USER], "edgecompose": {"explain": False}}),
)
_GETS = ("/", "/chat.js", "/health", "/metrics", "/v1/models", "/v1/models/task:alpha", "//v1/models/", "/api/tags")
_HEADERS = (
    f"Origin: {ORIGIN}",
    "Origin: http://evil.example",
    "Host: evil.example",
    "Expect: 100-continue",
    "Transfer-Encoding: chunked",
    "Content-Length: 5",
    "Connection: Upgrade\r\nUpgrade: websocket",
    "Authorization: bearer x",
    "Sec-Fetch-Site: cross-site",
    "Access-Control-Request-Method: POST",
    "Access-Control-Request-Headers: a,b",
)
_FILE = "sent"


class QuickComposer(Composer):
    """A composer of a real bundle whose answers need no model."""

    def warm_up(self) -> None:
        """Load nothing."""

    def embed(self, text: str) -> tuple[Any, int]:
        """A vector that is the same for every text."""
        return np.zeros(4, np.float32), len(text)

    def compose(
        self, prompt: Prompt, request: Request | None = None, *, cancellation: Cancellation | None = None
    ) -> Composition:
        """The same blend for every prompt."""
        query_text(conversation(prompt), (request or Request()).route_by)
        return Composition(RETRIEVAL, MergeSettings(), MergedAdapter({}, "c" * 64))

    def generate(
        self, prompt: Prompt, request: Request | None = None, *, cancellation: Cancellation | None = None
    ) -> Generation:
        """A few tokens."""
        request = request or Request()
        if len(query_text(conversation(prompt), request.route_by)) > 10_000:
            raise PromptTooLong("the prompt is too long")
        tokens = min(request.max_tokens or 5, 5)
        chunks = (Chunk(f" {number}", 1) for number in range(tokens))
        composition = self.compose(prompt, request)
        return Generation(composition, chunks, lambda: ANSWER, cancellation or Cancellation())


class _Errors(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(f"{record.getMessage()} {record.exc_info}")


class Harness:
    """A server in this process, whose connections are pairs of sockets."""

    def __init__(self) -> None:
        root = Path(tempfile.mkdtemp(prefix="edgecompose-attack-"))
        write_bundle(root)
        self.composer = QuickComposer(Bundle(root), choose_device("cpu"))
        self.server = Server(create_app(self.composer, SETTINGS), SETTINGS)
        self.server.config.load()
        self.errors = _Errors()
        logging.getLogger().addHandler(self.errors)
        self.loop = asyncio.new_event_loop()
        self.cases = 0

    def exchange(self, sent: bytes) -> bytes:
        """What the server answers to the bytes of one connection.

        Raises:
            AssertionError: it does not end, logs an error, or keeps something.
        """
        self.cases += 1
        answer = self.loop.run_until_complete(self._exchange(sent))
        if self.cases % 200 == 0:
            gc.collect()  # what nobody has waited for is said then
        lines, self.errors.lines = self.errors.lines, []
        assert not lines, lines
        return answer

    async def _exchange(self, sent: bytes) -> bytes:
        near, far = socket.socketpair()
        state = self.server.server_state
        await self.loop.connect_accepted_socket(
            lambda: Connection(config=self.server.config, server_state=state, app_state={}, settings=SETTINGS), near
        )
        reader, writer = await asyncio.open_connection(sock=far)
        parts = []
        try:
            async with asyncio.timeout(8):
                try:
                    writer.write(sent)
                    writer.write_eof()
                    while part := await reader.read(65536):
                        parts.append(part)
                except (ConnectionResetError, BrokenPipeError):
                    pass  # an answer to what is no HTTP may come before all of it was read
                while state.connections or state.tasks:
                    await asyncio.sleep(0.001)
        except TimeoutError as error:
            raise AssertionError("the connection does not end") from error
        finally:
            writer.close()
        return b"".join(parts)


@functools.cache
def _harness_of(process: int) -> Harness:
    return Harness()


def harness() -> Harness:
    """The harness of this process: threads and event loops do not survive a fork."""
    return _harness_of(os.getpid())


def responses(data: bytes, method: str = "POST") -> Iterator[tuple[int, str, bytes]]:
    """Status, content type and body of each whole response to requests of a method."""
    stream = io.BytesIO(data)

    class Source:
        def makefile(self, *arguments: Any, **settings: Any) -> io.BytesIO:
            return stream

    while stream.tell() < len(data):
        response = http.client.HTTPResponse(Source(), method=method)  # type: ignore[arg-type]  # it only reads from it
        stream.close = lambda: None  # type: ignore[method-assign]  # the next response follows
        try:
            response.begin()
            body = response.read()
        except (http.client.HTTPException, ValueError):
            return  # cut, because its client broke the protocol
        yield response.status, response.headers.get("content-type", ""), body


def check_response(status: int, kind: str, body: bytes) -> None:
    """Hold what every response promises.

    Raises:
        AssertionError: it is an internal error, or not of the form of the API.
    """
    assert status < 500, (status, body[:300])
    if kind.startswith("application/json") and body:
        json.loads(body)
    elif kind.startswith("text/event-stream"):
        for event in body.decode().split("\n\n"):
            data = event.removeprefix("data: ")
            if data and not event.startswith(":") and data != "[DONE]":
                value = json.loads(data)
                assert "internal_error" not in str(value.get("error")), value
    else:
        assert status in (200, 204) or not body, (status, kind, body[:300])


def request_bytes(rng: random.Random) -> bytes:
    """A request that is answered, or one that is close to it."""
    if rng.random() < 0.15:
        method = rng.choice(("GET", "GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "BREW"))
        return f"{method} {rng.choice(_GETS)} HTTP/1.1\r\nHost: localhost\r\n{_more(rng)}\r\n".encode()
    path, call = rng.choice(CALLS)
    text = json.dumps(call)
    if rng.random() < 0.9:
        text = mutate_json_text(rng, text)
    body = text.encode("utf-8", "surrogatepass" if "\ud800" in text else "surrogateescape")
    length = len(body) if rng.random() < 0.97 else rng.choice((0, 1, len(body) - 1, len(body) + 1, 10**30))
    target = rng.choice((path, path, path, path, f"/{path}/", f"http://localhost{path}", f"{path}?a=%00%ff"))
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{_more(rng)}"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


def _more(rng: random.Random) -> str:
    return f"{rng.choice(_HEADERS)}\r\n" if rng.random() < 0.1 else ""


def _prepare_request(folder: Path) -> None:
    path, call = CALLS[0]
    body = json.dumps(call).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    (folder / _FILE).write_bytes(head.encode() + b"\r\n\r\n" + body)


def _mutate_request(rng: random.Random, folder: Path) -> None:
    requests = [request_bytes(rng) for _ in range(rng.choice((1, 1, 1, 2)))]
    heads = [request for request in requests if request.startswith(b"HEAD")]  # whose answers have no body
    sent = b"".join(heads[:1] or requests)
    if rng.random() < 0.15:
        sent = mutate_bytes(rng, sent)
    (folder / _FILE).write_bytes(sent)


def _attempt_request(folder: Path) -> str:
    sent = (folder / _FILE).read_bytes()
    answers = list(responses(harness().exchange(sent), "HEAD" if sent.startswith(b"HEAD") else "POST"))
    for status, kind, body in answers:
        check_response(status, kind, body)
    if answers and answers[0][0] < 400:
        return "accepted"
    raise ApiError("refused")


def _line(rng: random.Random) -> bytes:
    methods = {"/v1/chat/completions": "chat", "/v1/completions": "complete", "/v1/embeddings": "embed"}
    path, call = rng.choice(CALLS)
    message = {"jsonrpc": "2.0", "id": rng.randrange(9), "method": methods.get(path, "compose"), "params": call}
    if rng.random() < 0.2:
        method = rng.choice(("models", "health", "cancel", "dance", "$/x"))
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"id": 1}}
    text = json.dumps([message] * rng.randrange(1, 3) if rng.random() < 0.1 else message)
    if rng.random() < 0.9:
        text = mutate_json_text(rng, text)
    return text.encode("utf-8", "surrogatepass" if "\ud800" in text else "surrogateescape")


def _prepare_lines(folder: Path) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "chat", "params": CALLS[0][1]}
    (folder / _FILE).write_bytes(json.dumps(message).encode() + b"\n")


def _mutate_lines(rng: random.Random, folder: Path) -> None:
    sent = b"\n".join(_line(rng) for _ in range(rng.randrange(1, 4)))
    (folder / _FILE).write_bytes(mutate_bytes(rng, sent) if rng.random() < 0.1 else sent)


def _attempt_lines(folder: Path) -> str:
    stream, written = io.BytesIO((folder / _FILE).read_bytes()), list[bytes]()
    lines = bounded_lines(stream.read, SETTINGS.body_bytes)
    StdioServer(harness().composer, lines, written.append, settings=SETTINGS).serve()
    accepted = False
    for line in written:
        assert line.isascii() and line.endswith(b"\n")
        value = json.loads(line)
        for message in value if isinstance(value, list) else [value]:
            assert message["jsonrpc"] == "2.0" and ("method" in message or "id" in message), message
            assert message.get("error", {}).get("code") != INTERNAL, message
            accepted = accepted or "result" in message
    if accepted:
        return "accepted"
    raise ApiError("refused")


TARGETS = (
    Target("requests", "cheap", _prepare_request, _mutate_request, _attempt_request),
    Target("jsonrpc", "cheap", _prepare_lines, _mutate_lines, _attempt_lines),
)
