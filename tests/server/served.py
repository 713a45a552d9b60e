"""A server on a tiny bundle, and the clients that call it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Composer, open_bundle
from edgecompose.server.config import CallLimits, ServerSettings
from edgecompose.server.http.app import create_app
from edgecompose.server.http.run import listen
from edgecompose.server.http.serving import Server
from tests.fixtures_tiny import TASKS

PROMPT = TASKS["animals"][0]
TALK: Any = [{"role": "user", "content": PROMPT}]
SETTINGS = ServerSettings(calls=CallLimits(max_tokens=64), body_bytes=20_000)


@dataclass(frozen=True)
class Served:
    """A server that runs, and what it serves."""

    url: str
    port: int
    composer: Composer
    server: Server

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=30)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=30)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)


@contextlib.contextmanager
def serving(bundle: Path, settings: ServerSettings) -> Iterator[Served]:
    ready = threading.Event()
    with open_bundle(bundle, device="cpu") as composer, listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        server = Server(create_app(composer, settings, ready=ready.set), settings)
        thread = threading.Thread(target=server.serve_until_ended, args=(listening,))
        thread.start()
        try:
            assert ready.wait(60)
            yield Served(f"http://127.0.0.1:{port}", port, composer, server)
        finally:
            server.end()
            thread.join(30)
            assert not thread.is_alive()
