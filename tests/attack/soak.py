"""Runs a server under mixed load, and watches its memory, descriptors, threads and answers.

    python -m tests.attack.soak --seconds 60 --seed 0
    python -m tests.attack.soak --bundle models/demo --json

Callers ask the same questions again and again, leave in the middle, read slowly or not at all, send what is wrong, and
the bundle's manifest is replaced meanwhile. Exit code 1 says that there are faults.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx

from tests.attack.requests_targets import check_response, request_bytes, responses

_CALLERS = 6
_QUESTIONS = ("the cat sat on a mat", "what is 12 times 9?", "Is the sky blue? Answer:", "two and two is")
#: What a process may keep beyond what it had after its first third: bytes of memory, descriptors, threads.
_MORE_MEMORY, _MORE_DESCRIPTORS, _MORE_THREADS = 256 << 20, 8, 4
#: Seconds in which everything has to be quiet again, and the process has to be gone.
_QUIET, _GONE = 20.0, 8.0


@dataclass
class Report:
    """What was done, what the process took, and what was wrong."""

    seconds: float = 0.0
    done: Counter[str] = field(default_factory=Counter)
    memory_mib: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    exit_code: int | None = None


class Soak:
    """A server process, and the callers that load it.

    Args:
        bundle: copied, so that its manifest can be replaced.
        root: an empty folder.
    """

    def __init__(self, bundle: Path, root: Path, *, seed: int) -> None:
        self._bundle = shutil.copytree(bundle, root / "bundle", copy_function=_link)
        self._log = root / "log"
        self._seed = seed
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._expected: dict[str, Any] = {}
        self.report = Report()
        self._url, self._port = "", 0

    def run(self, seconds: float) -> Report:
        """Load the server for so many seconds, then look whether it comes to rest, and end it."""
        command = [sys.executable, "-m", "edgecompose", "serve", str(self._bundle), "--port", "0"]
        start = time.monotonic()
        with self._log.open("w+b") as log, subprocess.Popen(command, stderr=log, stdout=log) as process:
            try:
                self._wait_for_start(process)
                callers = [threading.Thread(target=self._call, args=(number,)) for number in range(_CALLERS)]
                for caller in callers:
                    caller.start()
                while time.monotonic() < start + seconds:
                    self._measure(process.pid)
                    time.sleep(min(1.0, seconds / 10))
                self._stop.set()
                for caller in callers:
                    caller.join(_QUIET)
                self._check_rest(process.pid)
                process.send_signal(signal.SIGTERM)
                self.report.exit_code = process.wait(_GONE)
            except (httpx.HTTPError, subprocess.TimeoutExpired, RuntimeError) as error:
                self._fault(f"{type(error).__name__}: {error}")
            finally:
                self._stop.set()
                process.kill()
        if self.report.exit_code != 128 + signal.SIGTERM:
            self._fault(f"exit code {self.report.exit_code}")
        said = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        self.report.faults += [f"log: {line}" for line in said if "serving at" not in line][:20]
        self._check_growth()
        self.report.seconds = time.monotonic() - start
        return self.report

    def _wait_for_start(self, process: subprocess.Popen[bytes]) -> None:
        for _ in range(600):
            line = self._log.read_text(encoding="utf-8")
            if "serving at" in line:
                self._url = line.split()[3].rstrip("/")
                self._port = int(self._url.rpartition(":")[2])
                return
            if process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"the server did not start: {self._log.read_text(encoding='utf-8')}")

    def _call(self, number: int) -> None:
        """One caller: an action after another, each drawn."""
        rng = random.Random(f"{self._seed}:{number}")
        actions: tuple[Callable[[random.Random, httpx.Client], None], ...] = (
            self._ask,
            self._ask,
            self._stream,
            self._embed,
            self._score,
            self._leave,
            self._leave_waiting,
            self._read_slowly,
            self._send_nonsense,
            self._send_half,
            self._change_bundle,
        )
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                action = rng.choice(actions)
                try:
                    action(rng, client)
                except Exception as error:  # whatever a caller meets is a fault of the server
                    self._fault(f"{action.__name__}: {type(error).__name__}: {error!s:.300}")
                with self._lock:
                    self.report.done[action.__name__.lstrip("_")] += 1

    def _same(self, name: str, value: Any) -> None:
        """Hold that a call gets what the same call got before."""
        with self._lock:
            expected = self._expected.setdefault(name, value)
        if expected != value:
            self._fault(f"{name}: {value!r:.200} instead of {expected!r:.200}")

    def _post(self, client: httpx.Client, path: str, body: Any) -> Any:
        answer = client.post(f"{self._url}{path}", json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}: {answer.text:.200}")
        return answer.json()

    def _ask(self, rng: random.Random, client: httpx.Client) -> None:
        body = _chat(rng, max_tokens=12)
        answer = self._post(client, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
        self._same(json.dumps(body, sort_keys=True), answer)

    def _stream(self, rng: random.Random, client: httpx.Client) -> None:
        body = _chat(rng, max_tokens=12)
        answer = client.post(f"{self._url}/v1/chat/completions", json={**body, "stream": True})
        events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event.startswith("data: ")]
        if events[-1] != "[DONE]":
            raise RuntimeError("a stream has no end mark")
        chunks = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
        self._same(json.dumps(body, sort_keys=True), "".join(chunks))

    def _embed(self, rng: random.Random, client: httpx.Client) -> None:
        text = rng.choice(_QUESTIONS)
        self._same(f"embed {text}", self._post(client, "/v1/embeddings", {"input": text})["data"][0]["embedding"])

    def _score(self, rng: random.Random, client: httpx.Client) -> None:
        body = {**_chat(rng), "edgecompose": {"choices": ["yes", "no"]}}
        scores = self._post(client, "/v1/chat/completions", body)["edgecompose"]["choices"]
        self._same(json.dumps(body, sort_keys=True), scores)

    def _leave(self, rng: random.Random, client: httpx.Client) -> None:
        body = {**_chat(rng, max_tokens=200), "stream": rng.random() < 0.5}
        with self._connected(_request("/v1/chat/completions", body)):
            time.sleep(rng.random() * 0.2)

    def _leave_waiting(self, rng: random.Random, client: httpx.Client) -> None:
        sent = _request("/v1/embeddings", {"input": [rng.choice(_QUESTIONS)] * 500})
        with contextlib.ExitStack() as clients:
            for _ in range(5):
                clients.enter_context(self._connected(sent))
            time.sleep(0.05)

    def _read_slowly(self, rng: random.Random, client: httpx.Client) -> None:
        body = {"prompt": [rng.choice(_QUESTIONS)] * 4, "max_tokens": 20, "stream": True}
        with self._connected(_request("/v1/completions", body)) as connection:
            for _ in range(rng.randrange(20)):
                if not connection.recv(200):
                    break
                time.sleep(0.02)

    def _send_nonsense(self, rng: random.Random, client: httpx.Client) -> None:
        sent = request_bytes(rng)
        if sent.startswith(b"HEAD"):
            return
        with self._connected() as connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            data = b"".join(iter(lambda: connection.recv(65536), b""))
            for response in responses(data):
                check_response(*response)

    def _send_half(self, rng: random.Random, client: httpx.Client) -> None:
        sent = _request("/v1/chat/completions", _chat(rng))
        with self._connected(sent[: rng.randrange(len(sent))]):
            time.sleep(0.02)

    def _change_bundle(self, rng: random.Random, client: httpx.Client) -> None:
        manifest = self._bundle / "manifest.json"
        beside = manifest.with_name(f".{rng.random()}")
        shutil.copyfile(manifest, beside)
        beside.replace(manifest)
        if client.get(f"{self._url}/health").json()["bundle_changed"] is not True:
            raise RuntimeError("a changed bundle was not noticed")

    @contextlib.contextmanager
    def _connected(self, sent: bytes = b"") -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection:
            connection.sendall(sent)
            yield connection

    def _measure(self, process: int) -> None:
        self.report.memory_mib.append(_resident(process) >> 20)
        self.report.descriptors.append(len(list(Path(f"/proc/{process}/fd").iterdir())))
        self.report.threads.append(len(list(Path(f"/proc/{process}/task").iterdir())))

    def _check_rest(self, process: int) -> None:
        """Hold that nothing is left in the server when all callers have gone."""
        deadline = time.monotonic() + _QUIET
        while time.monotonic() < deadline:
            metrics = httpx.get(f"{self._url}/metrics", timeout=30).text
            if "edgecompose_requests_inside 0.0" in metrics:
                self._measure(process)
                return
            time.sleep(0.1)
        self._fault("requests are still inside when their callers have gone")

    def _check_growth(self) -> None:
        for name, values, more in (
            ("memory_mib", self.report.memory_mib, _MORE_MEMORY >> 20),
            ("descriptors", self.report.descriptors[:1] + self.report.descriptors[-1:], _MORE_DESCRIPTORS),
            ("threads", self.report.threads, _MORE_THREADS),
        ):
            if len(values) > 1 and values[-1] > max(values[: 1 + len(values) // 3]) + more:
                self._fault(f"{name} grew: {values}")

    def _fault(self, text: str) -> None:
        with self._lock:
            if len(self.report.faults) < 50:
                self.report.faults.append(text)


def _chat(rng: random.Random, **fields: Any) -> dict[str, Any]:
    talk = [{"role": "user", "content": rng.choice(_QUESTIONS)}]
    drawn = {"temperature": 1.0, "seed": rng.randrange(3)} if rng.random() < 0.3 else {}
    return {"model": rng.choice(("auto", "base")), "messages": talk, **drawn, **fields}


def _request(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


def _link(source: str, target: str) -> None:
    """Copy a file; a large one is linked, since only the manifest changes, by a rename."""
    if Path(source).stat().st_size > 1 << 20:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def _resident(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _show(report: Report) -> None:
    click.echo(f"{report.seconds:.0f} s, exit code {report.exit_code}")
    for name, count in sorted(report.done.items()):
        click.echo(f"  {name:<16}{count:>8}")
    for name in ("memory_mib", "descriptors", "threads"):
        values = getattr(report, name) or [0]
        click.echo(f"  {name:<16}first {values[0]}, most {max(values)}, last {values[-1]}")
    click.echo(f"  {'faults':<16}{len(report.faults):>8}")
    for fault in report.faults:
        click.echo(f"    {fault}")


@click.command()
@click.option("--seconds", type=float, default=60.0, show_default=True, help="How long the load lasts.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what callers do.")
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), default=Path("models/demo"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def main(seconds: float, seed: int, bundle: Path, as_json: bool) -> None:
    """Load a server of BUNDLE, and say what was wrong."""
    with tempfile.TemporaryDirectory(dir=bundle.resolve().parent) as folder:  # where files can be linked
        report = Soak(bundle, Path(folder), seed=seed).run(seconds)
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        _show(report)
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
