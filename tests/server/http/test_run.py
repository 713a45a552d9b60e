"""How a server is run: where it listens, who may use it, what it needs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from edgecompose.cli.main import main
from tests.fixtures_tiny import TASKS

pytestmark = pytest.mark.slow
PROMPT = TASKS["animals"][0]


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


def test_an_origin_that_no_page_has(bundle: Path) -> None:
    assert "such as http://localhost:3000" in refused(bundle, "--allow-origin", "localhost:3000", "--port", 0)


def test_the_extra_that_is_not_installed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'edgecompose[server]'" in refused(bundle)


@contextlib.contextmanager
def started(bundle: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "edgecompose", "serve", str(bundle), "--port", "0", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield process, process.stderr.readline().split()[3]
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_ends_the_server_and_a_stream_with_it(bundle: Path, number: signal.Signals, times: int) -> None:
    with started(bundle) as (process, url):
        assert httpx.get(f"{url}health", timeout=30).json()["status"] == "ok"
        body = {"prompt": [PROMPT] * 100, "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{url}v1/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            data = [next(lines)]
            for _ in range(times):
                process.send_signal(number)
                time.sleep(0.2)
            data += [line for line in lines if line]
        assert data[-1] == "data: [DONE]" and "server_ending" in data[-2]
        out, error = process.communicate(timeout=30)
    assert (out, error, process.returncode) == ("", "", 128 + number)


def test_an_idle_server_ends_at_once(bundle: Path) -> None:
    with started(bundle) as (process, url), httpx.Client() as client:
        client.get(f"{url}health", timeout=30)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 143 and time.monotonic() - start < 4


def test_a_process_that_native_code_holds_leaves_after_its_grace(bundle: Path) -> None:
    """A thread that never comes back keeps nobody: neither the caller nor the process."""
    program = (
        "import sys, time, edgecompose.server.config as c, dataclasses\n"
        "from edgecompose.engine.decoding.decoder_state import DecoderState\n"
        "from edgecompose.server.http.run import run_server\n"
        "from edgecompose import open_bundle\n"
        "DecoderState.step = DecoderState.forward = lambda *a, **k: time.sleep(1000)\n"
        "say = lambda url: print(url, flush=True)\n"
        "settings = c.ServerSettings(grace_seconds=1.5)\n"
        "with open_bundle(sys.argv[1], device='cpu') as composer:\n"
        "    sys.exit(run_server(composer, settings, host='127.0.0.1', port=0, ready=say))\n"
    )
    command = [sys.executable, "-c", program, str(bundle)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        results: list[httpx.Response] = []
        body = {"prompt": PROMPT}
        caller = threading.Thread(
            target=lambda: results.append(httpx.post(f"{url}v1/completions", json=body, timeout=30))
        )
        caller.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        caller.join(20)
        _, error = process.communicate(timeout=20)
    assert results[0].status_code == 503 and results[0].json()["error"]["code"] == "server_ending"
    assert process.returncode == 143
    (line,) = error.splitlines()
    assert "not ended after 1.5 s" in line


def test_models_that_cannot_be_loaded_are_one_line(bundle_copy: Path) -> None:
    tokenizer = next(bundle_copy.rglob("tokenizer.json"))
    data = bytearray(tokenizer.read_bytes())
    data[10] ^= 1
    tokenizer.write_bytes(data)
    assert "sha256" in refused(bundle_copy, "--port", 0)


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


def test_a_child_process_ends_when_its_parent_no_longer_reads(bundle: Path) -> None:
    command = [sys.executable, "-m", "edgecompose", "serve", str(bundle), "--stdio"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b'{"jsonrpc": "2.0", "id": 1, "method": "health"}\n')
        process.stdin.flush()
        assert b"bundle_changed" in process.stdout.readline()
        process.stdout.close()  # and standard input stays open
        try:
            process.wait(20)
        finally:
            process.kill()
        assert b"Traceback" not in process.stderr.read()
