"""The server as its clients see it: the official client, a web page, a caller that goes away."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")


from edgecompose import Request
from edgecompose.errors import FileDamaged
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
    assert chunks[0].model_extra and chunks[0].model_extra["edgecompose"]["weights"]  # before the first token
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
    assert all(model.created > 1_600_000_000 for model in client.models.list())
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


def test_callers_at_once_get_what_one_gets(bundle: Path) -> None:
    prompts = [prompt for prompts in TASKS.values() for prompt in prompts]
    with serving(bundle, replace(SETTINGS, workers=4)) as served:
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


def test_an_explanation_can_be_left_out(served: Served) -> None:
    body = {"messages": TALK, "max_tokens": 2, "edgecompose": {"explain": False}}
    answer = served.post("/v1/chat/completions", body)
    assert "edgecompose" not in answer.json() and len(answer.content) < 500
    scored = {**body, "edgecompose": {"explain": False, "choices": ["yes", "no"]}}
    assert list(served.post("/v1/chat/completions", scored).json()["edgecompose"]) == ["choices"]
    assert "edgecompose" not in served.post("/v1/chat/completions", {**body, "stream": True}).text


def test_a_completion_reads_on_from_its_prompt(served: Served) -> None:
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 8}
    text = served.post("/v1/completions", body).json()["choices"][0]["text"]
    model = served.composer.model
    ids = model.tokenizer.encode_prompt(PROMPT)
    again = served.post("/v1/completions", {**body, "prompt": PROMPT + text, "max_tokens": 1})
    assert model.tokenizer.encode_prompt(PROMPT + text)[: len(ids)] == ids and again.status_code == 200


def test_the_bundle_changes(bundle_copy: Path) -> None:
    with serving(bundle_copy, SETTINGS) as served:
        body = {"messages": TALK, "max_tokens": 2}
        assert served.get("/health").json()["bundle_changed"] is False
        assert "bundle_changed" not in served.post("/v1/chat/completions", body).json()["edgecompose"]
        manifest = bundle_copy / "manifest.json"
        text = manifest.read_text(encoding="utf-8")
        manifest.unlink()
        manifest.write_text(text + " ", encoding="utf-8")
        assert served.get("/health").json()["bundle_changed"] is True
        assert served.post("/v1/chat/completions", body).json()["edgecompose"]["bundle_changed"] is True


def test_what_cannot_be_loaded_from_a_changed_bundle_asks_for_a_restart(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*arguments: Any, **settings: Any) -> Any:
        raise FileDamaged("file 'adapters/x' is missing")

    with serving(bundle_copy, SETTINGS) as served:
        monkeypatch.setattr(served.composer, "generate", missing)
        body = {"messages": TALK, "max_tokens": 2}
        assert served.post("/v1/chat/completions", body).status_code == 500
        (bundle_copy / "manifest.json").unlink()
        refused = served.post("/v1/chat/completions", body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "bundle_changed")
        assert "restart the server" in refused.json()["error"]["message"]


def test_another_name_of_the_model(bundle: Path) -> None:
    with serving(bundle, replace(SETTINGS, aliases=("gpt-4o-mini",))) as served:
        answer = served.client().chat.completions.create(model="gpt-4o-mini", messages=TALK, max_tokens=2)
        assert answer.model == "gpt-4o-mini"
        assert served.client().models.retrieve("gpt-4o-mini").id in [m.id for m in served.client().models.list()]
        with pytest.raises(openai.NotFoundError, match="did you mean 'task:animals'"):
            served.client().chat.completions.create(model="animals", messages=TALK)


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v2", 404, "base URL http://127.0.0.1"),
        ("GET", "/v1/chat/completions", 405, "it has POST"),
        ("POST", "/health", 405, "it has GET"),
        ("POST", "/v1/responses", 404, "use /v1/chat/completions"),
        ("POST", "/chat/completions", 404, "/v1 is missing"),
        ("GET", "/models", 404, "/v1 is missing"),
        ("POST", "/v1/v1/chat/completions", 404, "/v1 is in the path twice"),
        ("GET", "/api/tags", 404, "not Ollama's"),
        ("GET", "/v1/models/nobody", 404, "no model is called"),
    ],
)
def test_what_is_not_there_says_what_is(served: Served, method: str, path: str, status: int, words: str) -> None:
    result = httpx.request(method, f"{served.url}{path}")
    assert result.status_code == status and words in result.json()["error"]["message"]
    assert (status == 405) == ("Allow" in result.headers)


def test_the_same_path_in_other_forms(served: Served) -> None:
    for path in ("//v1/models", "/v1/models/", "/v1//models", "http://localhost/v1/models", "/v1/models?x=1"):
        lines = (f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close", "", "")
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall("\r\n".join(lines).encode())
            data = b"".join(iter(lambda: client.recv(65536), b""))  # read at once
        assert data.startswith(b"HTTP/1.1 200") and b'"task:animals"' in data, path
    body = {"messages": TALK, "max_tokens": 1}
    assert served.post("/v1/chat/completions/", body).status_code == 200
