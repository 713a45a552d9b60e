"""Requests that are refused: other sites, hostile bodies, missing keys."""

from __future__ import annotations

import http.client
import json
import socket
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
    assert "maximum context length" in long.json()["error"]["message"]
    assert send(json.dumps({"messages": TALK, "max_tokens": 0}).encode()).status_code == 400
    for text in ('{"model": "\\ud800"}', '{"edgecompose": {"\\ud800": 1}}', '{"adapters": {"\\ud800": 1}}'):
        refused = send(f'{{"messages": {json.dumps(TALK)}, {text[1:]}'.encode())
        assert refused.status_code == 400 and "surrogate" in refused.json()["error"]["message"]
    deep = '{"a":' * 900 + "1" + "}" * 900
    assert send(f'{{"messages": {json.dumps(TALK)}, "edgecompose": {deep}}}'.encode()).status_code == 400
    assert send(b'{"messages": [{"role": "user", "content": "\\ud800"}]}').status_code == 400
    assert send(json.dumps({"messages": TALK, "adapters": {"nobody": 1}}).encode()).status_code == 400
    assert send(json.dumps({"messages": TALK, "max_tokens": 1}).encode()).status_code == 200


def test_an_error_before_a_stream_begins_is_a_status(served: Served) -> None:
    body = {"messages": TALK, "stream": True, "adapters": {"nobody": 1}}
    result = served.post("/v1/chat/completions", body)
    assert result.status_code == 400 and "nobody" in result.json()["error"]["message"]


def test_a_key(bundle: Path) -> None:
    key = "correct_horse_battery"
    with serving(bundle, replace(SETTINGS, key=key, origins=("http://tool.example",))) as served:
        refused = served.get("/v1/models")
        assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        for authorization in (f"Bearer {key}x", key, f"Basic {key}", "Bearer", "", f"Bearer {key} x"):
            assert served.get("/v1/models", Authorization=authorization).status_code == 401, authorization
        for authorization in (f"Bearer {key}", f"bearer {key}", f"BEARER  {key}"):
            assert served.get("/v1/models", Authorization=authorization).status_code == 200, authorization
        assert served.get("/metrics").status_code == 401
        assert served.get("/health").status_code == served.get("/").status_code == 200
        assert len(list(served.client(key).models.list())) == 5
        with pytest.raises(openai.AuthenticationError):
            served.client().models.list()


ORIGIN = "http://tool.example"
ASKS = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize("key", [None, "correct_horse_battery"])
def test_a_page_of_an_admitted_site_may_call(bundle: Path, key: str | None) -> None:
    with serving(bundle, replace(SETTINGS, key=key, origins=(ORIGIN, "app://obsidian.md"))) as served:
        url = f"{served.url}/v1/chat/completions"
        preflight = httpx.options(url, headers=ASKS)
        assert preflight.status_code == 204 and not preflight.content
        assert preflight.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert preflight.headers["Access-Control-Allow-Headers"] == ASKS["Access-Control-Request-Headers"]
        assert "Origin" in preflight.headers.get_list("Vary")
        assert httpx.options(url, headers={**ASKS, "Origin": "app://obsidian.md"}).status_code == 204
        refused = httpx.options(url, headers={**ASKS, "Origin": "http://evil.example"})
        assert refused.status_code == 403 and "Access-Control-Allow-Origin" not in refused.headers
        secret = {} if key is None else {"Authorization": f"Bearer {key}"}
        body = {"messages": TALK, "max_tokens": 2}
        for fields in ({}, {"stream": True}, {"max_tokens": "x"}):
            answer = served.post("/v1/chat/completions", {**body, **fields}, Origin=ORIGIN, **secret)
            assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN and answer.headers["Vary"] == "Origin"
        for path in ("/nothing", "/health", "/v1/models"):
            assert served.get(path, Origin=ORIGIN).headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "Access-Control-Allow-Origin" not in served.get("/health").headers


def test_options_without_a_page_name_the_methods(served: Served) -> None:
    assert httpx.options(f"{served.url}/v1/chat/completions").headers["Allow"] == "POST, OPTIONS"
    assert httpx.options(f"{served.url}/health").status_code == 204


def test_what_refuses_says_which_option_admits(served: Served) -> None:
    assert "--allow-host" in served.get("/health", Host="evil.example").json()["error"]["message"]
    refused = served.get("/health", Origin="http://a.b").json()["error"]["message"]
    assert "http://a.b" in refused and "--allow-origin" in refused


def test_json_is_neither_sniffed_nor_stored(served: Served) -> None:
    for path in ("/health", "/v1/models", "/nothing", "/"):
        headers = served.get(path).headers
        assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")


def test_two_lengths_are_refused_and_the_connection_ends(served: Served) -> None:
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Length: 2", "Transfer-Encoding: chunked")
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall("\r\n".join((*lines, "", "0", "", "")).encode())
        data = b"".join(iter(lambda: client.recv(65536), b""))
    assert data.startswith(b"HTTP/1.1 400")


def test_the_host_of_an_absolute_target_is_checked_too(served: Served) -> None:
    for target, status in (("http://localhost/health", b"200"), ("http://evil.example/health", b"421")):
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
            client.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert client.recv(65536).startswith(b"HTTP/1.1 " + status)
