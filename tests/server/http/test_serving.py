"""The server of an application: it ends from any thread, and says why it did not start."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import open_bundle
from edgecompose.errors import FileDamaged
from edgecompose.server.http.app import create_app
from edgecompose.server.http.run import Ending, listen
from edgecompose.server.http.serving import Server
from tests.server.served import SETTINGS, serving


def test_a_failure_to_load_is_raised_to_who_runs_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise FileDamaged("file 'x' is missing")

    with open_bundle(bundle, device="cpu") as composer, listen("127.0.0.1", 0) as listening:
        monkeypatch.setattr(composer, "warm_up", broken)
        server = Server(create_app(composer, SETTINGS), SETTINGS)
        with pytest.raises(FileDamaged, match="'x' is missing"):
            server.serve_until_ended(listening)


def test_kept_connections_do_not_delay_the_end(bundle: Path) -> None:
    with httpx.Client() as client, serving(bundle, SETTINGS) as served:
        assert client.get(f"{served.url}/health").json()["status"] == "ok"
        served.server.end()
        with pytest.raises(httpx.HTTPError):
            while True:
                client.get(f"{served.url}/health", timeout=5)


def test_signals_are_taken_in_the_main_thread_alone() -> None:
    ends: list[Any] = []

    def enter() -> None:
        with Ending(lambda: ends.append(1), 5) as ending:
            ends.append(ending.signal)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(5)
    assert ends == [0]
