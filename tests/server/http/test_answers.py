"""Who is answered when: turns, waiting, clients that go, and the end of the server."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose.engine.decoding.pass_queue import PassQueue
from edgecompose.retrieval.embedder import Embedder
from tests.server.served import PROMPT, SETTINGS, TALK, Served, serving

#: It starts processes; `make check` leaves it out.
pytestmark = pytest.mark.slow


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[int]]]:
    """Passes of the model that wait until they are let go on; gives how many began."""
    go_on, passes = threading.Event(), list[int]()
    run = PassQueue._result

    def slow(self: PassQueue, job: Any) -> Any:
        passes.append(len(job.ids))
        assert go_on.wait(30)
        return run(self, job)

    monkeypatch.setattr(PassQueue, "_result", slow)

    def release() -> list[int]:
        go_on.set()
        return passes

    release.passes = passes  # type: ignore[attr-defined]
    yield release
    go_on.set()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def calling(served: Served, path: str, **body: Any) -> Iterator[socket.socket]:
    """A client that has sent a call and reads nothing by itself."""
    data = json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall("\r\n".join((*lines, f"Content-Length: {len(data)}", "", "")).encode() + data)
        yield client


def inside(served: Served) -> float:
    line = next(x for x in served.get("/metrics").text.splitlines() if x.startswith("edgecompose_requests_inside "))
    return float(line.split()[1])


def chat(served: Served, **fields: Any) -> httpx.Response:
    return served.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 2, **fields})


def test_too_many_requests_get_status_429(bundle: Path, held: Any) -> None:
    body = {"messages": TALK, "max_tokens": 2}
    with serving(bundle, replace(SETTINGS, active=1, queue=1)) as served:
        result: list[int] = []

        def call() -> None:
            result.append(served.post("/v1/chat/completions", body).status_code)

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: "edgecompose_requests_inside 2.0" in served.get("/metrics").text)
        refused = served.post("/v1/chat/completions", body)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        held()
        for thread in threads:
            thread.join(30)
        assert result == [200, 200]
        assert served.post("/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_goes_away_stops_the_model(bundle: Path, held: Any, stream: bool) -> None:
    with serving(bundle, SETTINGS) as served:
        body = json.dumps({"messages": TALK, "max_tokens": 60, "stream": stream}).encode()
        caller = socket.create_connection(("127.0.0.1", served.port))
        lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
        caller.sendall(head.encode() + body)
        until(lambda: len(held.passes) == 1)
        caller.close()
        time.sleep(0.3)  # for the server to notice
        held()
        until(lambda: "edgecompose_requests_inside 0.0" in served.get("/metrics").text)
        assert len(held.passes) < 10
        assert served.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 2}).status_code == 200


def test_a_long_answer_delays_nobody_to_its_end(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four long answers and a short one: the short one takes its turn among them, step by step."""
    run, passes = PassQueue._result, list[int]()

    def counting(self: PassQueue, job: Any) -> Any:
        passes.append(len(job.ids))
        time.sleep(0.002)
        return run(self, job)

    monkeypatch.setattr(PassQueue, "_result", counting)
    with serving(bundle, replace(SETTINGS, calls=replace(SETTINGS.calls, max_tokens=None))) as served:
        long = [
            threading.Thread(target=chat, args=(served,), kwargs={"max_tokens": 450, "model": "base"}) for _ in range(4)
        ]
        for thread in long:
            thread.start()
        until(lambda: len(passes) > 20)
        before = len(passes)
        assert chat(served, max_tokens=4).status_code == 200
        assert len(passes) - before < 250  # of the 2,000 that the others take
        assert any(thread.is_alive() for thread in long)
        for thread in long:
            thread.join(60)


def test_sixty_four_requests_at_once_succeed(bundle: Path) -> None:
    with serving(bundle, SETTINGS) as served:
        client, statuses = served.client(), list[str | None]()

        def call() -> None:
            answer = client.chat.completions.create(model="auto", messages=TALK, max_tokens=2)
            statuses.append(answer.choices[0].finish_reason)

        threads = [threading.Thread(target=call) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert statuses == ["length"] * 64


def test_a_stream_that_waits_gets_comments_and_leaves_the_queue_with_its_client(bundle: Path, held: Any) -> None:
    settings = replace(SETTINGS, active=1, first_seconds=0.05, comment_seconds=0.05)
    with serving(bundle, settings) as served, calling(served, "/v1/chat/completions", messages=TALK):
        until(lambda: len(held.passes) == 1)
        with contextlib.ExitStack() as clients:
            body = {"messages": TALK, "stream": True}
            waiting = [clients.enter_context(calling(served, "/v1/chat/completions", **body)) for _ in range(5)]
            until(lambda: inside(served) == 6)
            data = b""
            while data.count(b": waiting") < 2:
                data += waiting[0].recv(4096)
            assert data.startswith(b"HTTP/1.1 200")
        until(lambda: inside(served) == 1)
        held()


def test_a_stream_that_is_wrong_is_a_status_even_while_others_are_answered(bundle: Path, held: Any) -> None:
    with serving(bundle, replace(SETTINGS, active=1)) as served, calling(served, "/v1/completions", prompt="x"):
        until(lambda: len(held.passes) == 1)
        assert chat(served, stream=True, max_tokens="x").status_code == 400
        held()


def test_embeddings_end_with_their_client(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, tokens = list[str](), Embedder.tokens

    def slow(self: Embedder, text: str) -> list[int]:
        embedded.append(text)
        time.sleep(0.02)
        return tokens(self, text)

    with serving(bundle, SETTINGS) as served:
        monkeypatch.setattr(Embedder, "tokens", slow)
        with calling(served, "/v1/embeddings", input=["a cat"] * 1000):
            until(lambda: len(embedded) > 2)
            assert chat(served).status_code == 200  # takes its turn between two texts
            assert len(embedded) < 500
        until(lambda: inside(served) == 0)
        assert len(embedded) < 900


def test_tokens_of_an_answer_that_was_cut_are_counted(bundle: Path, held: Any) -> None:
    with serving(bundle, SETTINGS) as served:
        with calling(served, "/v1/chat/completions", messages=TALK, max_tokens=60, stream=True) as client:
            until(lambda: len(held.passes) == 1)
            held()
            while client.recv(65536).count(b"data:") < 1:
                pass
        until(lambda: inside(served) == 0)
        assert 'edgecompose_tokens_total{kind="generated"}' in served.get("/metrics").text


def test_an_internal_error_is_json_and_one_line_in_the_log(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **settings: Any) -> None:
        raise ZeroDivisionError("by zero\nand more")

    with serving(bundle, SETTINGS) as served:
        monkeypatch.setattr(served.composer, "generate", broken)
        result = chat(served)
        assert (result.status_code, result.json()["error"]["code"]) == (500, "internal_error")
        assert result.headers["X-Content-Type-Options"] == "nosniff"
        (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert "ZeroDivisionError" in record.getMessage() and "\n" not in record.getMessage()
        assert record.exc_info is None


@pytest.mark.parametrize("times", [1, 2])
def test_the_end_of_the_server_ends_streams_and_calls_properly(bundle: Path, held: Any, times: int) -> None:
    """A thread that is held inside the model keeps nobody waiting."""
    results = dict[str, httpx.Response]()
    settings = replace(SETTINGS, active=2, grace_seconds=2 if times == 1 else 60)
    with contextlib.ExitStack() as clients, serving(bundle, settings) as served:
        client = clients.enter_context(httpx.Client(timeout=30))

        def call(name: str, **fields: Any) -> None:
            body = {"messages": TALK, "max_tokens": 60, **fields}
            results[name] = client.post(f"{served.url}/v1/chat/completions", json=body)

        started = [threading.Thread(target=call, args=("stream",), kwargs={"stream": True})]
        started[0].start()
        until(lambda: len(held.passes) == 1)
        for name in ("call", "waits"):
            started.append(threading.Thread(target=call, args=(name,)))
            started[-1].start()
        until(lambda: inside(served) == 3)
        time.sleep(0.6)  # the stream has waited for its first token, and has a header now
        for _ in range(times):
            served.server.end()
            time.sleep(0.3)
        for thread in started:
            thread.join(10)
            assert not thread.is_alive()
        held()
    lines = results["stream"].text.split("\n\n")
    assert lines[-2] == "data: [DONE]" and "server_ending" in lines[-3]
    for name in ("call", "waits"):
        assert (results[name].status_code, results[name].json()["error"]["code"]) == (503, "server_ending")


def test_an_answer_that_ends_within_the_grace_is_whole(bundle: Path) -> None:
    with serving(bundle, SETTINGS) as served:
        text = served.composer.run(PROMPT).text
        with httpx.stream(
            "POST", f"{served.url}/v1/chat/completions", json={"messages": TALK, "max_tokens": 6, "stream": True}
        ) as stream:
            lines = stream.iter_lines()
            data = [next(lines)]
            served.server.end()
            data += [line for line in lines if line]
        assert data[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in data[:-1] if line]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
