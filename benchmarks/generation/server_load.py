"""Response times of `edgecompose serve` under several clients at once."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.measuring.prompts import TASK_PROMPTS

CLIENTS = (1, 4, 8)
TOKENS = 16


def measure_server(
    bundle: Path, *, calls: int = 48, tokens: int = TOKENS, clients: Sequence[int] = CLIENTS
) -> dict[str, Any]:
    """Seconds of calls to /v1/chat/completions, by number of clients; each prompt has its own retrieval and blend.

    Args:
        calls: of all clients together.
        tokens: the longest answer; all are of that length where the base has no end token.
        clients: numbers of clients, the smallest first.
    """
    command = [sys.executable, "-m", "edgecompose", "serve", str(bundle), "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = re.search(r"http://\S+", server.stderr.readline())
        if address is None:
            raise SystemExit(f"the server did not start: {server.stderr.read()}")
        with httpx.Client(base_url=address[0], timeout=300, trust_env=False) as client:
            for number in range(len(TASK_PROMPTS)):
                _call(client, number, tokens)
            loads = {str(count): _load(client, count, calls, tokens=tokens) for count in clients}
            one = loads[str(clients[0])]
            for load in loads.values():
                load |= {f"{name}_of_one_client": load[f"{name}_s"] / one[f"{name}_s"] for name in ("p50", "p99")}
            return loads
    finally:
        server.terminate()
        server.wait(30)


def _load(client: httpx.Client, clients: int, calls: int, *, tokens: int) -> dict[str, float]:
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        done = list(threads.map(lambda number: _call(client, number, tokens), range(calls)))
    elapsed = time.perf_counter() - start
    seconds = sorted(seconds for seconds, _ in done)
    return {
        "p50_s": statistics.median(seconds),
        "p99_s": seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        "calls_per_s": calls / elapsed,
        "tokens_per_s": sum(count for _, count in done) / elapsed,
    }


def _call(client: httpx.Client, number: int, tokens: int) -> tuple[float, int]:
    """Seconds of one call, and the number of tokens of its answer."""
    prompt = TASK_PROMPTS[number % len(TASK_PROMPTS)]
    body = {"model": "auto", "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
    start = time.perf_counter()
    response = client.post("v1/chat/completions", json=body)
    seconds = time.perf_counter() - start
    response.raise_for_status()
    return seconds, int(response.json()["usage"]["completion_tokens"])
