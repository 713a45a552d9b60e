"""How a server is run: where it listens, who may use it, what it needs."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from edgecompose.cli.main import main

pytestmark = pytest.mark.slow


def refused(*arguments: object, **environment: str) -> str:
    done = CliRunner().invoke(main, ["serve", *map(str, arguments)], env=environment)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def test_other_machines_need_a_key(bundle: Path) -> None:
    assert "no key is set" in refused(bundle, "--host", "0.0.0.0", "--port", 0)
    assert "has 3 characters" in refused(bundle, "--host", "0.0.0.0", "--port", 0, EDGECOMPOSE_API_KEY="abc")


def test_an_address_that_is_taken(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen at 127.0.0.1" in refused(bundle, "--port", taken.getsockname()[1])


def test_the_extra_that_is_not_installed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'edgecompose[server]'" in refused(bundle)


def test_a_server_that_is_started_and_ended(bundle: Path) -> None:
    command = [sys.executable, "-m", "edgecompose", "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[3]
        assert httpx.get(f"{url}health", timeout=30).json()["status"] == "ok"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert (out, error, process.returncode) == ("", "", 0)


def test_a_child_process_answers_lines(bundle: Path) -> None:
    calls: list[dict[str, Any]] = [
        {"jsonrpc": "2.0", "id": 1, "method": "models"},
        {
            "jsonrpc": "2.0",
            "id": 2,
            "method": "chat",
            "params": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
        },
    ]
    command = [sys.executable, "-m", "edgecompose", "serve", str(bundle), "--stdio"]
    text = "".join(json.dumps(call) + os.linesep for call in calls)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=True)
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["result"]["models"][0] == "auto"
    assert second["id"] == 2
