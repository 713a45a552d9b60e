"""The server as its clients see it: the official client, a web page, a caller that goes away."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")


from edgecompose import Request
from edgecompose.engine.decoder_state import DecoderState
from tests.fixtures_tiny import TASKS
from tests.server.served import PROMPT, SETTINGS, TALK, Served, serving


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    with serving(bundle, SETTINGS) as result:
        yield result


def expected_text(served: Served, **settings: Any) -> str:
    return served.composer.run(PROMPT, Request(**settings)).text


def test_a_chat_through_the_official_client(served: Served) -> None:
    client = served.client()
    answer = client.chat.completions.create(model="auto", messages=TALK, max_tokens=12)
    assert answer.choices[0].message.content == expected_text(served, max_tokens=12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    messages = answer.model_extra["edgecompose"] if answer.model_extra else {}
    assert messages["weights"] == dict(served.composer.retrieve(PROMPT).weights)
    assert {"neighbours", "distribution", "composition", "timings_ms"} <= set(messages)


def test_a_stream_through_the_official_client(served: Served) -> None:
    stream = served.client().chat.completions.create(
        model="auto", messages=TALK, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected_text(served, max_tokens=12)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [*[None] * (len(chunks) - 2), "length"]
    assert chunks[-2].model_extra and chunks[-2].model_extra["edgecompose"]["weights"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 4


def test_completions_through_the_official_client(served: Served) -> None:
    prompts = [PROMPT, TASKS["colours"][0]]
    answer = served.client().completions.create(model="auto", prompt=prompts, max_tokens=5)
    alone = [served.composer.run(prompt, Request(max_tokens=5, raw=True)).text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == alone
    assert [choice.index for choice in answer.choices] == [0, 1]
    stream = served.client().completions.create(model="auto", prompt=prompts, max_tokens=5, stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone


def test_models_through_the_official_client(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["auto", "base", *(f"task:{name}" for name in sorted(TASKS))]
    assert client.models.retrieve("task:animals").id == "task:animals"
    with pytest.raises(openai.NotFoundError, match="no model is called"):
        client.models.retrieve("task:wizards")


def test_a_model_decides_the_blend(served: Served) -> None:
    def messages(**fields: Any) -> Any:
        result = served.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 3, **fields})
        assert result.status_code == 200, result.text
        return result.json()["edgecompose"]["weights"]

    assert messages(model="task:colours") == {"colours": 1.0}
    assert messages(model="base") == {}
    assert messages(adapters={"animals": 0.5, "numbers": 0.25}) == {"animals": 0.5, "numbers": 0.25}
    assert "animals" not in messages(edgecompose={"exclude": ["animals"]})
    both = served.post("/v1/chat/completions", {"messages": TALK, "model": "base", "adapters": {"animals": 1}})
    assert both.status_code == 400 and "exclude each other" in both.json()["error"]["message"]


def test_choices_are_scored(served: Served) -> None:
    body = {"messages": TALK, "edgecompose": {"choices": ["yes", "no"]}}
    result = served.post("/v1/chat/completions", body).json()
    assert result["edgecompose"]["choices"] == served.composer.score(PROMPT, ["yes", "no"])
    assert result["choices"][0]["message"]["content"] in ("yes", "no")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[int]]]:
    """Passes of the model that wait until they are let go on; gives how many began."""
    go_on, passes = threading.Event(), list[int]()
    forward = DecoderState.forward

    def slow(self: DecoderState, ids: Any, **settings: Any) -> Any:
        passes.append(len(ids))
        assert go_on.wait(30)
        return forward(self, ids, **settings)

    monkeypatch.setattr(DecoderState, "forward", slow)

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


def test_too_many_requests_get_status_429(bundle: Path, held: Any) -> None:
    body = {"messages": TALK, "max_tokens": 2}
    with serving(bundle, replace(SETTINGS, workers=1, queue=1)) as served:
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


def test_callers_at_once_get_what_one_gets(bundle: Path) -> None:
    prompts = [prompt for prompts in TASKS.values() for prompt in prompts]
    with serving(bundle, replace(SETTINGS, workers=4, queue=100)) as served:
        alone = [served.composer.run(prompt, Request(max_tokens=8)).text for prompt in prompts]
        result: dict[int, str] = {}

        def call(index: int) -> None:
            body = {"messages": [{"role": "user", "content": prompts[index]}], "max_tokens": 8}
            answer = served.post("/v1/chat/completions", body).json()
            result[index] = answer["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=call, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [result[index] for index in range(len(prompts))] == alone


def test_the_page_asks_nothing_of_anyone_else(served: Served) -> None:
    for path, kind in (("/", "text/html"), ("/chat.js", "text/javascript"), ("/chat.css", "text/css")):
        result = served.get(path)
        assert result.status_code == 200 and result.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in result.headers["content-security-policy"]
        assert "://" not in result.text
