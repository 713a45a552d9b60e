"""Requests that are refused: other sites, hostile bodies, missing keys."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")


from tests.server.served import SETTINGS, TALK, Served, serving


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    with serving(bundle, SETTINGS) as result:
        yield result


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
        result = connection.getresponse()
        assert result.status == status
        assert result.getheader("Access-Control-Allow-Origin") is None
        result.read()
        connection.close()


def test_the_own_page_may_call(served: Served) -> None:
    body = {"messages": TALK, "max_tokens": 1}
    assert served.post("/v1/chat/completions", body, Origin=served.url).status_code == 200


def test_a_form_of_another_site_is_no_call(served: Served) -> None:
    text = json.dumps({"messages": TALK})
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        result = httpx.post(f"{served.url}/v1/chat/completions", content=text, headers={"Content-Type": kind})
        assert result.status_code == 415


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
    for result, status in ((served.get("/v2"), 404), (served.get("/v1/chat/completions"), 405)):
        assert result.status_code == status and "nothing that this server does" in result.json()["error"]["message"]


def test_an_error_before_a_stream_begins_is_a_status(served: Served) -> None:
    body = {"messages": TALK, "stream": True, "adapters": {"nobody": 1}}
    result = served.post("/v1/chat/completions", body)
    assert result.status_code == 400 and "nobody" in result.json()["error"]["message"]


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
