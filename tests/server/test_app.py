"""The server as its clients see it: the official client, a web page, a caller that goes away."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

pytest.importorskip("torch", reason="exports want the packages of edgecompose-export")

import uvicorn

from edgecompose import Composer, Request, open_bundle
from edgecompose.engine.decoder_state import DecoderState
from edgecompose.retrieval.embedder import Embedder
from edgecompose.server.app import create_app
from edgecompose.server.config import ServerSettings
from tests.fixtures_tiny import TASKS

PROMPT = TASKS["animals"][0]
TALK: Any = [{"role": "user", "content": PROMPT}]
SETTINGS = ServerSettings(max_tokens=64, body_bytes=20_000)


@dataclass(frozen=True)
class Served:
    """A server that runs, and what it serves."""

    url: str
    port: int
    composer: Composer

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=30)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=30)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)


@contextlib.contextmanager
def serving(bundle: Path, settings: ServerSettings) -> Iterator[Served]:
    ready = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    with open_bundle(bundle, device="cpu") as composer, listening:
        app = create_app(composer, settings, ready=ready.set)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(60)
            yield Served(f"http://127.0.0.1:{port}", port, composer)
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    with serving(bundle, SETTINGS) as found:
        yield found


def wanted(served: Served, **settings: Any) -> str:
    return served.composer.run(PROMPT, Request(**settings)).text


# The official client


def test_a_chat_through_the_official_client(served: Served) -> None:
    client = served.client()
    answer = client.chat.completions.create(model="auto", messages=TALK, max_tokens=12)
    assert answer.choices[0].message.content == wanted(served, max_tokens=12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    told = answer.model_extra["edgecompose"] if answer.model_extra else {}
    assert told["weights"] == dict(served.composer.retrieve(PROMPT).weights)
    assert {"neighbours", "distribution", "composition", "timings_ms"} <= set(told)


def test_a_stream_through_the_official_client(served: Served) -> None:
    stream = served.client().chat.completions.create(
        model="auto", messages=TALK, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == wanted(served, max_tokens=12)
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


def test_embeddings_through_the_official_client(served: Served) -> None:
    found = served.client().embeddings.create(model="any", input=[PROMPT, "hello"])
    for one, text in zip(found.data, (PROMPT, "hello"), strict=True):
        np.testing.assert_array_equal(
            np.asarray(one.embedding, np.float32), served.composer.retriever.embedder.embed(text)
        )
    assert found.usage.prompt_tokens == sum(
        len(served.composer.retriever.embedder.tokens(text)) for text in (PROMPT, "hello")
    )
    plain = served.client().embeddings.create(model="any", input=PROMPT, encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(found.data[0].embedding)


def test_models_through_the_official_client(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["auto", "base", *(f"task:{name}" for name in sorted(TASKS))]
    assert client.models.retrieve("task:animals").id == "task:animals"
    with pytest.raises(openai.NotFoundError, match="no model is called"):
        client.models.retrieve("task:wizards")


def test_a_model_decides_the_blend(served: Served) -> None:
    def told(**fields: Any) -> Any:
        found = served.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 3, **fields})
        assert found.status_code == 200, found.text
        return found.json()["edgecompose"]["weights"]

    assert told(model="task:colours") == {"colours": 1.0}
    assert told(model="base") == {}
    assert told(adapters={"animals": 0.5, "numbers": 0.25}) == {"animals": 0.5, "numbers": 0.25}
    assert "animals" not in told(edgecompose={"exclude": ["animals"]})
    both = served.post("/v1/chat/completions", {"messages": TALK, "model": "base", "adapters": {"animals": 1}})
    assert both.status_code == 400 and "exclude each other" in both.json()["error"]["message"]


def test_the_blend_alone(served: Served) -> None:
    found = served.post("/v1/compose", {"messages": TALK}).json()
    composition = served.composer.compose(PROMPT)
    assert found["composition"] == composition.merged.digest
    assert found["weights"] == dict(composition.retrieval.weights) and found["prompt"] == PROMPT


def test_choices_are_scored(served: Served) -> None:
    body = {"messages": TALK, "edgecompose": {"choices": ["yes", "no"]}}
    found = served.post("/v1/chat/completions", body).json()
    assert found["edgecompose"]["choices"] == served.composer.score(PROMPT, ["yes", "no"])
    assert found["choices"][0]["message"]["content"] in ("yes", "no")


# What is refused


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:80"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "LOCALHOST:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
    ids=str,
)
def test_a_page_of_another_site_gets_nothing(served: Served, headers: dict[str, str], status: int) -> None:
    for path in ("/health", "/v1/models", "/"):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        connection.putrequest("GET", path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        found = connection.getresponse()
        assert found.status == status
        assert found.getheader("Access-Control-Allow-Origin") is None
        found.read()
        connection.close()


def test_the_own_page_may_call(served: Served) -> None:
    body = {"messages": TALK, "max_tokens": 1}
    assert served.post("/v1/chat/completions", body, Origin=served.url).status_code == 200


def test_a_form_of_another_site_is_no_call(served: Served) -> None:
    text = json.dumps({"messages": TALK})
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        found = httpx.post(f"{served.url}/v1/chat/completions", content=text, headers={"Content-Type": kind})
        assert found.status_code == 415


def test_hostile_bodies(served: Served) -> None:
    def send(content: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json; charset=utf-8"}
        return httpx.post(f"{served.url}/v1/chat/completions", content=content, headers=headers, timeout=30)

    assert send(b"{").status_code == 400
    assert send(b"\xff").status_code == 400
    assert send(b"[" * 10_000).status_code == 400
    assert send(b" " * 20_001).status_code == 413
    long = send(json.dumps({"messages": [{"role": "user", "content": "a b " * 2000}]}).encode())
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert send(json.dumps({"messages": TALK, "max_tokens": 65}).encode()).status_code == 400
    assert send(b'{"messages": [{"role": "user", "content": "\\ud800"}]}').status_code == 400
    assert send(json.dumps({"messages": TALK, "adapters": {"nobody": 1}}).encode()).status_code == 400
    assert send(json.dumps({"messages": TALK, "max_tokens": 1}).encode()).status_code == 200


def test_what_is_not_there(served: Served) -> None:
    for found, status in ((served.get("/v2"), 404), (served.get("/v1/chat/completions"), 405)):
        assert found.status_code == status and "nothing that this server does" in found.json()["error"]["message"]


def test_an_error_before_a_stream_begins_is_a_status(served: Served) -> None:
    body = {"messages": TALK, "stream": True, "adapters": {"nobody": 1}}
    found = served.post("/v1/chat/completions", body)
    assert found.status_code == 400 and "nobody" in found.json()["error"]["message"]


def test_a_key(bundle: Path) -> None:
    key = "correct horse battery"
    with serving(bundle, replace(SETTINGS, key=key, origins=("http://tool.example",))) as served:
        assert served.get("/v1/models").status_code == 401
        assert served.get("/v1/models", Authorization=f"Bearer {key}x").status_code == 401
        assert served.get("/v1/models", Authorization=f"Bearer {key}").status_code == 200
        assert served.get("/metrics").status_code == 401
        assert served.get("/health").status_code == served.get("/").status_code == 200
        assert served.get("/health", Origin="http://tool.example").status_code == 200
        assert len(list(served.client(key).models.list())) == 5
        with pytest.raises(openai.AuthenticationError):
            served.client().models.list()


# Load


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


def test_too_many_requests_are_told_to_come_again(bundle: Path, held: Any) -> None:
    body = {"messages": TALK, "max_tokens": 2}
    with serving(bundle, replace(SETTINGS, workers=1, queue=1)) as served:
        found: list[int] = []

        def call() -> None:
            found.append(served.post("/v1/chat/completions", body).status_code)

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
        assert found == [200, 200]
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
        found: dict[int, str] = {}

        def call(index: int) -> None:
            body = {"messages": [{"role": "user", "content": prompts[index]}], "max_tokens": 8}
            answer = served.post("/v1/chat/completions", body).json()
            found[index] = answer["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=call, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [found[index] for index in range(len(prompts))] == alone


def test_what_is_counted(bundle: Path) -> None:
    with serving(bundle, SETTINGS) as served:
        answer = served.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 3}).json()
        served.get("/nowhere/at/all")
        text = served.get("/metrics").text
        assert 'edgecompose_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
        assert 'edgecompose_requests_total{path="other",status="404"} 1.0' in text
        assert f'edgecompose_tokens_total{{kind="prompt"}} {answer["usage"]["prompt_tokens"]}.0' in text
        assert 'edgecompose_tokens_total{kind="generated"} 3.0' in text
        assert served.get("/health").json() == {"status": "ok", "bundle": "tiny", "device": "cpu"}


def test_the_page_asks_nothing_of_anyone_else(served: Served) -> None:
    for path, kind in (("/", "text/html"), ("/chat.js", "text/javascript"), ("/chat.css", "text/css")):
        found = served.get(path)
        assert found.status_code == 200 and found.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in found.headers["content-security-policy"]
        assert "://" not in found.text


def test_embeddings_are_tokenised_away_from_the_event_loop_and_the_encoder_is_opened_under_its_lock(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, tokenised = [], []
    init, tokens = Embedder.__init__, Embedder.tokens

    def opening(self: Embedder, *arguments: Any) -> None:
        opened.append(served.composer.retriever._loading._is_owned())  # type: ignore[attr-defined]
        init(self, *arguments)

    def tokenising(self: Embedder, text: str) -> list[int]:
        with contextlib.suppress(RuntimeError):
            tokenised.append(asyncio.get_running_loop())
        return tokens(self, text)

    monkeypatch.setattr(Embedder, "__init__", opening)
    monkeypatch.setattr(Embedder, "tokens", tokenising)
    served.composer.release_embedder()
    answer = served.post("/v1/embeddings", {"model": "any", "input": ["a cat", "two dogs bark"]})
    assert answer.status_code == 200 and len(answer.json()["data"]) == 2
    assert (opened, tokenised) == ([True], [])
