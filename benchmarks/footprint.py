"""Cold start, peak memory and growth: what a process takes, ours beside llama.cpp's; used by `speed.py`."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompose import EdgeComposeError, Request, open_bundle
from edgecompose.bundle import read_manifest
from edgecompose.memory import release_freed_memory

#: A word of one token, of which prompts of a given length are made.
_WORD = " the"
LENGTHS = (32, 256, 1024)
EXECUTABLE = Path("dist/edgecompose/edgecompose")
_LLAMA = """
import sys, llama_cpp
model, lora, tokens = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
threads = dict(n_threads={threads}, n_threads_batch={threads})
llama = llama_cpp.Llama(model, lora_path=lora, n_ctx=2048, verbose=False, **threads)
llama.eval([265] * tokens)
for _ in range(8):
    llama.eval([llama.sample(temp=0)])
"""


@dataclass(frozen=True)
class Finished:
    """Seconds that a process ran, and its peak resident memory in MB (10^6 bytes)."""

    seconds: float
    peak_mb: float


def run(command: list[str]) -> Finished:
    """Run a command to its end.

    Raises:
        SystemExit: it failed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command[:4]} failed: {said.read().decode()[-800:]}")
    return Finished(seconds, usage.ru_maxrss * 1024 / 1e6)


def measure_cold_start(bundle: Path, prompt: str, gguf: Path, lora: Path | None, runs: int = 7) -> dict[str, float]:
    """Median seconds from the start of a process on a warm disk.

    `compose`: to a composed adapter in a file, retrieval included; `first_token`: to an answer of one token; both by
    the interpreter, and by the executable of `make binary` where that was built. `llama_cpp_first_token`: Python,
    llama.cpp with the same adapter already composed, the same number of tokens read, one written.
    """
    programs = {"": [sys.executable, "-m", "edgecompose"]}
    if EXECUTABLE.is_file():
        programs["executable_"] = [str(EXECUTABLE)]
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, program in programs.items():
            rest = [str(bundle), prompt, "--device", "cpu"]
            composing = [[*program, "compose", *rest, "-o", f"{folder}/{name}{i}"] for i in range(runs + 1)]
            answering = [[*program, "run", *rest, "--max-tokens", "1"]] * (runs + 1)
            result[f"{name}compose"] = _median(composing)
            result[f"{name}first_token"] = _median(answering)
    if lora is not None:
        result["llama_cpp_first_token"] = _median([_llama(gguf, lora, 64)] * (runs + 1))
    return result


def measure_memory(bundle: Path, adapters: list[str], gguf: Path, lora: Path | None) -> dict[str, Any]:
    """Peak resident MB of one answer of 8 tokens to prompts of several lengths, under a blend of three adapters.

    `graphs` is the size of the bundle's graphs with their data, `allowed` 200 MB more.
    """
    files = read_manifest(bundle).files
    graphs = sum(f.bytes for name, f in files.items() if name.endswith((".onnx", ".onnx.data"))) / 1e6
    by_hand = [part for name in adapters for part in ("--adapter", f"{name}={1 / len(adapters):.3f}")]
    peaks, rival = {}, {}
    for length in LENGTHS:
        command = [sys.executable, "-m", "edgecompose", "run", str(bundle), _WORD * length, "--raw", "--device", "cpu"]
        peaks[length] = run([*command, "--max-tokens", "8", *by_hand]).peak_mb
        if lora is not None:
            rival[length] = run(_llama(gguf, lora, length)).peak_mb
    composing = [sys.executable, "-m", "edgecompose", "retrieve", str(bundle), "Is it true?", "--device", "cpu"]
    return {
        "graphs": graphs, "allowed": graphs + 200, "answer": peaks, "retrieve": run(composing).peak_mb,
        "llama_cpp_answer": rival,
    }  # fmt: skip


def measure_growth(bundle: Path, requests: int = 1000) -> dict[str, float]:
    """Resident MB of this process after a tenth, half and all of many requests, most of them with a blend of their own.

    What the C library keeps of freed memory is given back before each look.
    """
    with open_bundle(bundle, device="cpu") as composer:
        names = sorted(composer.bundle.manifest.adapters)
        seen: dict[str, float] = {}
        for turn in range(requests):
            chosen = [names[(turn * 7 + k * 5) % len(names)] for k in range(1 + turn % 3)]
            weights = dict.fromkeys(chosen, 0.3 + turn * 37 % 101 / 200)
            prompt = f"Number {turn}: is it true that{_WORD * (turn * 13 % 90)}?"
            request = Request(weights=None if turn % 4 == 0 else weights, max_tokens=2, reuse=turn % 2 == 0)
            try:
                composer.run(prompt, request)
            except EdgeComposeError as error:
                raise SystemExit(f"request {turn} failed: {error}") from error
            if turn + 1 in (requests // 10, requests // 2, requests):
                release_freed_memory()
                seen[str(turn + 1)] = resident_mb()
    return seen


def resident_mb() -> float:
    """Resident memory of this process in MB, now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def llama_installed() -> bool:
    """Whether llama.cpp can be measured."""
    return importlib.util.find_spec("llama_cpp") is not None


def _llama(gguf: Path, lora: Path, tokens: int) -> list[str]:
    return [sys.executable, "-c", _LLAMA.format(threads=os.cpu_count()), str(gguf), str(lora), str(tokens)]


def _median(commands: list[list[str]]) -> float:
    """Of all runs but the first, which warms the disk."""
    return statistics.median([run(command).seconds for command in commands][1:])
