"""Connections: what a client may take its time for, and what it may break."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose.engine.decoding.pass_queue import PassQueue
from tests.server.served import SETTINGS, TALK, Served, serving

#: It starts processes; `make check` leaves it out.
pytestmark = pytest.mark.slow

QUICK = replace(
    SETTINGS, header_seconds=0.3, body_seconds=0.3, write_seconds=0.3, idle_seconds=0.3, connections=20, active=1
)


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    with serving(bundle, QUICK) as result:
        yield result


@contextlib.contextmanager
def connected(served: Served, *sent: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        for part in sent:
            client.sendall(part)
        yield client


def rest(client: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def call(path: str = "/v1/chat/completions", **body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: local", HEALTH, HEALTH + b"GE"])
def test_who_does_not_go_on_is_disconnected(served: Served, sent: bytes) -> None:
    with connected(served, sent) as client:
        data = rest(client)
    assert data.startswith(b"HTTP/1.1 200") if HEALTH in sent else data == b""


def test_a_header_that_comes_byte_by_byte_is_not_waited_for(served: Served) -> None:
    with connected(served) as client:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in b"GET /health HTTP/1.1\r\nX: " + b"x" * 100:
                client.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - start < 4


def test_a_body_that_does_not_come_gets_408(served: Served) -> None:
    with connected(served, call(messages=TALK)[:-5]) as client:
        data = rest(client)
    assert data.startswith(b"HTTP/1.1 408") and b'"code":"timeout"' in data


def test_who_does_not_read_is_dropped_and_others_have_the_place(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, passes = PassQueue._result, list[int]()

    def counting(self: PassQueue, job: Any) -> Any:
        passes.append(len(job.ids))
        return run(self, job)

    monkeypatch.setattr(PassQueue, "_result", counting)
    monkeypatch.setattr("edgecompose.server.http.connection._UNSENT_BYTES", 1024)
    settings = replace(QUICK, calls=replace(QUICK.calls, max_tokens=None), write_seconds=1.5)
    with serving(bundle, settings) as served:
        prompts = [TALK[0]["content"]] * 20
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect(("127.0.0.1", served.port))
            client.sendall(call("/v1/completions", prompt=prompts, stream=True, max_tokens=400))
            deadline = time.monotonic() + 30
            before = -1
            while before != len(passes) and time.monotonic() < deadline:  # until it is paused
                before = len(passes)
                time.sleep(0.3)
            answer = served.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 2})
            assert answer.status_code == 200
            until_inside(served, 0)
        assert len(passes) < 20 * 400


def until_inside(served: Served, number: int) -> None:
    deadline = time.monotonic() + 30
    while f"edgecompose_requests_inside {number}.0" not in served.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_that_has_ended_its_sending_gets_its_answer(served: Served) -> None:
    for stream in (False, True):
        with connected(served, call(messages=TALK, max_tokens=3, stream=stream)) as client:
            client.shutdown(socket.SHUT_WR)
            data = rest(client)
        assert b"HTTP/1.1 200" in data and b'"finish_reason":"length"' in data


@pytest.mark.parametrize("abrupt", [False, True])
def test_a_client_that_has_gone_altogether_ends_its_answer(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, abrupt: bool
) -> None:
    run, passes = PassQueue._result, list[int]()

    def slow(self: PassQueue, job: Any) -> Any:
        passes.append(len(job.ids))
        time.sleep(0.02)
        return run(self, job)

    monkeypatch.setattr(PassQueue, "_result", slow)
    with serving(bundle, QUICK) as served:
        with connected(served, call(messages=TALK, max_tokens=60)) as client:
            until_inside(served, 1)
            if abrupt:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until_inside(served, 0)
        assert len(passes) < 50


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:20]),
)
def test_what_is_no_http_is_refused_in_json(served: Served, sent: bytes) -> None:
    with connected(served, sent) as client:
        data = rest(client)
    assert data == b"" or json.loads(data.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert served.get("/health").status_code == 200


def test_garbage_after_a_request_ends_the_connection_quietly(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with connected(served, call(messages=TALK, max_tokens=20), b"\x00\x01garbage\r\n\r\n" * 10) as client:
        rest(client)
    assert served.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_an_offer_of_another_protocol_is_not_taken_up(served: Served) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "h2c"}
    assert httpx.get(f"{served.url}/health", headers=headers).status_code == 200


def test_more_connections_than_may_be_open_are_told_so(served: Served) -> None:
    with contextlib.ExitStack() as clients:
        opened = [clients.enter_context(connected(served)) for _ in range(25)]
        last = rest(opened[-1])
        assert last.startswith(b"HTTP/1.1 503") and b'"code":"too_many"' in last
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if served.get("/health").status_code == 200:
                return
    raise AssertionError("the server did not come back")


def test_large_bodies_of_a_client_that_sends_all_before_it_reads(served: Served) -> None:
    with connected(served, call(messages=[{"role": "user", "content": "x" * 3_000_000}])) as client:
        data = rest(client)
    assert data.startswith(b"HTTP/1.1 413") and b'"code":"too_large"' in data


def test_small_packets_are_sent_at_once(served: Served) -> None:
    """Without TCP_NODELAY each answer on a kept connection takes 40 ms and more."""
    with httpx.Client() as client:
        client.get(f"{served.url}/health")
        start = time.monotonic()
        for _ in range(10):
            client.get(f"{served.url}/health")
        assert time.monotonic() - start < 0.3
