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
from edgecompose.engine.decoder_state import DecoderState
from edgecompose.server.stdio import StdioServer
from tests.fixtures_tiny import TASKS

PROMPT = TASKS["animals"][0]
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}


class Parent:
    """What started the process: writes lines, reads lines."""

    def __init__(self, composer: Composer) -> None:
        self._input: queue.Queue[bytes | None] = queue.Queue()
        self.lines: queue.Queue[dict[str, Any]] = queue.Queue()
        server = StdioServer(composer, iter(self._input.get, None), self._take, max_tokens=64)
        self._thread = threading.Thread(target=server.serve)
        self._thread.start()

    def _take(self, line: bytes) -> None:
        assert line.endswith(b"\n") and line.count(b"\n") == 1
        result = json.loads(line)
        assert result.pop("jsonrpc") == "2.0"
        self.lines.put(result)

    def write(self, line: bytes) -> None:
        self._input.put(line)

    def call(self, name: Any, method: str, **params: Any) -> None:
        self.write(json.dumps({"jsonrpc": "2.0", "id": name, "method": method, "params": params}).encode())

    def read(self) -> dict[str, Any]:
        return self.lines.get(timeout=30)

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
        (b"\xff", -32700, "not JSON"),
        (b"[]", -32600, "an object"),
        (b'{"id": 1}', -32600, "an object"),
        (b'{"id": [1], "method": "chat"}', -32600, "id has to be"),
        (b'{"id": 1, "method": "chat", "params": [1]}', -32600, "params an object"),
        (b'{"id": 1, "method": "cancel", "params": {"id": [1]}}', -32600, "id has to be"),
        (b'{"id": 1, "method": "dance"}', -32601, "use chat, complete, embed, compose, models"),
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
    forward = DecoderState.forward

    def slow(self: DecoderState, ids: Any, **settings: Any) -> Any:
        passes.append(len(ids))
        entered.set()
        assert go_on.wait(30)
        return forward(self, ids, **settings)

    monkeypatch.setattr(DecoderState, "forward", slow)
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
