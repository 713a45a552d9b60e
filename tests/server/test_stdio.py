"""JSON-RPC lines: calls, pieces, cancelling, and what is refused."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Composer, Request, open_bundle
from edgecompose.engine.decoding.pass_queue import PassQueue
from edgecompose.server.config import CallLimits, ServerSettings
from edgecompose.server.jsonrpc import TooLong
from edgecompose.server.stdio import StdioServer
from tests.fixtures_tiny import TASKS

PROMPT = TASKS["animals"][0]
SETTINGS = ServerSettings(calls=CallLimits(max_tokens=64), active=1, queue=20)
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}


class Parent:
    """What started the process: writes lines, reads lines."""

    def __init__(self, composer: Composer) -> None:
        self._input: queue.Queue[bytes | None] = queue.Queue()
        self.lines: queue.Queue[Any] = queue.Queue()
        self.output_is_closed = False
        server = StdioServer(composer, iter(self._input.get, None), self._take, settings=SETTINGS)
        self._thread = threading.Thread(target=server.serve)
        self._thread.start()

    def _take(self, line: bytes) -> None:
        if self.output_is_closed:
            raise BrokenPipeError
        assert line.endswith(b"\n") and line.count(b"\n") == 1 and line.isascii()
        result = json.loads(line)
        for message in result if isinstance(result, list) else [result]:
            assert message.pop("jsonrpc") == "2.0"
        self.lines.put(result)

    def write(self, line: bytes) -> None:
        self._input.put(line)

    def call(self, name: Any, method: str, **params: Any) -> None:
        self.write(json.dumps({"jsonrpc": "2.0", "id": name, "method": method, "params": params}).encode())

    def read(self) -> Any:
        return self.lines.get(timeout=30)

    def wait(self) -> None:
        """Wait until the server has ended by itself."""
        self._thread.join(30)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self._input.put(None)
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def composer(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as opened:
        yield opened


@pytest.fixture
def parent(composer: Composer) -> Iterator[Parent]:
    made = Parent(composer)
    yield made
    made.close()


def test_an_answer_and_its_chunks(parent: Parent, composer: Composer) -> None:
    expected = composer.run(PROMPT, Request(max_tokens=8)).text
    parent.call("a", "chat", **CHAT)
    whole = parent.read()
    assert whole["id"] == "a" and whole["result"]["choices"][0]["message"]["content"] == expected
    parent.call(7, "chat", **CHAT, stream=True)
    text = ""
    while "method" in (result := parent.read()):
        assert result["method"] == "piece" and result["params"]["id"] == 7
        text += result["params"]["text"]
    assert text == expected == result["result"]["choices"][0]["message"]["content"]
    assert result["result"]["edgecompose"]["weights"]


def test_the_other_methods(parent: Parent, composer: Composer) -> None:
    parent.call(1, "complete", prompt=PROMPT, max_tokens=3)
    assert parent.read()["result"]["choices"][0]["text"] == composer.run(PROMPT, Request(max_tokens=3, raw=True)).text
    parent.call(2, "compose", messages=CHAT["messages"])
    assert parent.read()["result"]["composition"] == composer.compose(PROMPT).merged.digest
    parent.call(4, "embed", input="hello")
    vector, tokens = composer.embed("hello")
    result = parent.read()["result"]
    assert result["data"][0]["embedding"] == pytest.approx(vector.tolist())
    assert result["usage"]["total_tokens"] == tokens
    parent.call(3, "models")
    assert parent.read()["result"]["models"][:2] == ["auto", "base"]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b"{", -32700, "not JSON"),
        (b"\xff", -32700, "not UTF-8"),
        (b"[]", -32600, "the batch is empty"),
        (b"5", -32600, "expected an object"),
        (b'{"id": 1}', -32600, "method is null"),
        (b'{"id": [1], "method": "chat"}', -32600, "expected a string or a number"),
        (b'{"id": 1, "method": "chat", "params": [1]}', -32602, "params is [1]; expected an object"),
        (b'{"id": 1, "method": "cancel", "params": {"id": [1]}}', -32602, "params.id has to be"),
        (b'{"id": 1, "method": "chat", "params": {"model": "\\ud800"}}', -32700, "surrogate"),
        (b"[" * 5000, -32700, "nested too deep"),
        (b'{"id": 1, "method": "dance"}', -32601, "use chat, complete, embed, compose, models, health"),
        (b'{"id": 1, "method": "chat"}', -32000, "'messages' is missing"),
        (b'{"id": 1, "method": "complete", "params": {"model": "x", "prompt": "x"}}', -32000, "no model"),
    ],
)
def test_what_is_no_call_is_refused_and_others_go_on(parent: Parent, line: bytes, code: int, words: str) -> None:
    parent.write(line)
    error = parent.read()["error"]
    assert error["code"] == code and words in error["message"]
    parent.write(b"\n")
    parent.call(3, "models")
    assert parent.read()["id"] == 3


def test_cancelling_and_shutting_down(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on, passes = threading.Event(), threading.Event(), list[int]()
    run = PassQueue._result

    def slow(self: PassQueue, job: Any) -> Any:
        passes.append(len(job.ids))
        entered.set()
        assert go_on.wait(30)
        return run(self, job)

    monkeypatch.setattr(PassQueue, "_result", slow)
    parent = Parent(composer)
    parent.call(1, "chat", **{**CHAT, "max_tokens": 60})
    parent.call(2, "chat", **CHAT)
    assert entered.wait(30)
    parent.call(1, "chat", **CHAT)
    assert "is still being answered" in parent.read()["error"]["message"]
    threading.Timer(0.2, go_on.set).start()
    parent.call(3, "cancel", id=1)
    result = {}
    for _ in range(3):
        line = parent.read()
        result[line["id"]] = line
    assert result[3]["result"] == {"cancelled": True}
    assert result[1]["error"]["code"] == -32800
    assert "result" in result[2] and len(passes) < 20
    parent.call(4, "cancel", id=1)
    assert parent.read()["result"] == {"cancelled": False}
    parent.call(5, "shutdown")
    assert parent.read() == {"id": 5, "result": None}
    parent.close()


def test_a_fault_of_ours_is_answered_too(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **settings: object) -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(composer, "compose", broken)
    parent = Parent(composer)
    parent.call(1, "compose", **CHAT)
    assert parent.read() == {"id": 1, "error": {"code": -32603, "message": "ZeroDivisionError: broken"}}
    parent.call(2, "models")
    assert parent.read()["id"] == 2
    parent.close()


def test_a_notification_gets_no_answer(parent: Parent) -> None:
    parent.write(b'{"jsonrpc": "2.0", "method": "$/setTrace", "params": {"value": "off"}}')
    parent.write(b'{"jsonrpc": "2.0", "method": "models"}')
    parent.write(json.dumps({"method": "chat", "params": {**CHAT, "stream": True}}).encode())
    parent.call(1, "chat", **CHAT)
    assert parent.read()["id"] == 1 and parent.lines.empty()


def test_an_error_keeps_the_id_of_its_call(parent: Parent) -> None:
    for line, name in (('{"id": 7, "method": "chat", "params": [1]}', 7), ('{"id": "ä\\n", "method": 5}', "ä\n")):
        parent.write(line.encode())
        assert parent.read()["id"] == name
    parent.call("日本 \U0001f600", "models")
    assert parent.read()["id"] == "日本 \U0001f600"


def test_a_batch_is_answered_by_one_line(parent: Parent) -> None:
    batch = [
        {"jsonrpc": "2.0", "id": 1, "method": "models"},
        {"jsonrpc": "2.0", "method": "models"},
        {"jsonrpc": "2.0", "id": 2, "method": "chat", "params": CHAT},
        5,
        {"jsonrpc": "2.0", "id": 3, "method": "dance"},
    ]
    parent.write(json.dumps(batch).encode())
    answers = parent.read()
    assert {answer["id"]: "result" in answer for answer in answers} == {1: True, None: False, 3: False, 2: True}
    parent.write(b'[{"method": "models"}, {"method": "x"}]')
    parent.call(4, "health")
    health = parent.read()
    assert health["id"] == 4 and health["result"]["bundle_changed"] is False


def test_a_call_that_waits_is_cancelled_at_once(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    run = PassQueue._result

    def slow(self: PassQueue, job: Any) -> Any:
        entered.set()
        assert go_on.wait(30)
        return run(self, job)

    monkeypatch.setattr(PassQueue, "_result", slow)
    parent = Parent(composer)
    parent.call(1, "chat", **CHAT)
    assert entered.wait(30)
    for name in range(2, 22):
        parent.call(name, "chat", **CHAT)
    parent.call(99, "chat", **CHAT)
    assert "21 calls wait" in parent.read()["error"]["message"]
    parent.call("c", "cancel", id=20)
    assert {parent.read()["id"], parent.read()["id"]} == {20, "c"}
    parent.output_is_closed = True
    go_on.set()
    parent.wait()


def test_a_parent_that_no_longer_reads_ends_the_server(composer: Composer) -> None:
    parent = Parent(composer)
    parent.output_is_closed = True
    parent.call(1, "models")
    parent.wait()


def test_a_line_that_is_too_long_is_refused_and_the_next_is_read(composer: Composer) -> None:
    lines: list[bytes | TooLong] = [TooLong(100), b'{"id": 1, "method": "models"}']
    written: list[Any] = []
    StdioServer(composer, lines, lambda line: written.append(json.loads(line)), settings=SETTINGS).serve()
    assert "longer than 100 bytes" in written[0]["error"]["message"] and "result" in written[1]
