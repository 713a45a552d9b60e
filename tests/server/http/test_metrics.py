"""Metrics of a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")


from tests.server.served import SETTINGS, TALK, Served, serving


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    with serving(bundle, SETTINGS) as result:
        yield result


def test_what_is_counted(bundle: Path) -> None:
    with serving(bundle, SETTINGS) as served:
        answer = served.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 3}).json()
        served.get("/nowhere/at/all")
        text = served.get("/metrics").text
        assert 'edgecompose_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
        assert 'edgecompose_requests_total{path="other",status="404"} 1.0' in text
        assert f'edgecompose_tokens_total{{kind="prompt"}} {answer["usage"]["prompt_tokens"]}.0' in text
        assert 'edgecompose_tokens_total{kind="generated"} 3.0' in text
        assert served.get("/health").json() == {
            "status": "ok",
            "bundle": "tiny",
            "device": "cpu",
            "bundle_changed": False,
        }
