"""Cold start, peak memory and growth: what a process takes, ours beside llama.cpp's.

    python benchmarks/footprint.py models/demo [--gguf FILE --lora FILE]

`speed.py` runs it as a process of its own: a child's peak memory counts from its parent's size, and growth wants a
process in which nothing else happened. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
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
from edgecompose.bundle.files import read_manifest
from edgecompose.engine.memory import release_freed_memory

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
    """Seconds that a process ran, its peak resident memory in MB (10^6 bytes), and what it printed."""

    seconds: float
    peak_mb: float
    output: str


@dataclass(frozen=True)
class Rival:
    """A GGUF base and a LoRA file for llama.cpp."""

    gguf: Path
    lora: Path

    def command(self, tokens: int) -> list[str]:
        """Read a prompt of so many tokens, and write eight."""
        program = _LLAMA.format(threads=os.cpu_count())
        return [sys.executable, "-c", program, str(self.gguf), str(self.lora), str(tokens)]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default="Is this review positive or negative? I loved every minute of it.")
    parser.add_argument("--gguf", type=Path, help="the base as GGUF, for llama.cpp")
    parser.add_argument("--lora", type=Path, help="the blend of the bundle's first three adapters as GGUF")
    options = parser.parse_args()
    rival = None if options.gguf is None or options.lora is None else Rival(options.gguf, options.lora)
    result = {
        "cold_start_s": measure_cold_start(options.bundle, options.prompt, rival),
        "peak_memory_mb": measure_memory(options.bundle, options.prompt, rival),
        "resident_mb_after_requests": measure_growth(options.bundle),
    }
    print(json.dumps(result))


def run(command: list[str]) -> Finished:
    """Run a command to its end.

    Raises:
        SystemExit: it failed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command[:4]} failed: {said.read().decode()[-800:]}")
        printed.seek(0)
        return Finished(seconds, usage.ru_maxrss * 1024 / 1e6, printed.read().decode(errors="replace"))


def measure_cold_start(bundle: Path, prompt: str, rival: Rival | None, runs: int = 7) -> dict[str, float]:
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
    if rival is not None:
        result["llama_cpp_first_token"] = _median([rival.command(64)] * (runs + 1))
    return result


def measure_memory(bundle: Path, prompt: str, rival: Rival | None) -> dict[str, Any]:
    """Peak resident MB of one answer of 8 tokens to prompts of several lengths: `retrieved` under the blend that
    retrieval finds, `three_adapters` under one of three adapters by hand. llama.cpp has those three composed already.

    `graphs` is the size of the bundle's graphs with their data, `allowed` 200 MB more.
    """
    files = read_manifest(bundle).files
    graphs = sum(f.bytes for name, f in files.items() if name.endswith((".onnx", ".onnx.data"))) / 1e6
    adapters = sorted(read_manifest(bundle).adapters)[:3]
    by_hand = [part for name in adapters for part in ("--adapter", f"{name}={1 / len(adapters):.3f}")]
    peaks: dict[str, dict[int, float]] = {"retrieved": {}, "three_adapters": {}, "llama_cpp": {}}
    with open_bundle(bundle, device="cpu") as composer:
        tokenizer = composer.model.tokenizer
        ids = tokenizer.encode(prompt * 40)
        prompts = {length: tokenizer.decode(ids[-length:]) for length in LENGTHS}
    for length, text in prompts.items():
        command = [sys.executable, "-m", "edgecompose", "run", str(bundle), text, "--raw", "--device", "cpu"]
        peaks["retrieved"][length] = run([*command, "--max-tokens", "8"]).peak_mb
        peaks["three_adapters"][length] = run([*command, "--max-tokens", "8", *by_hand]).peak_mb
        if rival is not None:
            peaks["llama_cpp"][length] = run(rival.command(length)).peak_mb
    retrieving = [sys.executable, "-m", "edgecompose", "retrieve", str(bundle), prompt, "--device", "cpu"]
    return {"graphs": graphs, "allowed": graphs + 200, "retrieve": run(retrieving).peak_mb, **peaks}


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
            prompt = f"Number {turn}: is it true that{' the' * (turn * 13 % 90)}?"
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


def _median(commands: list[list[str]]) -> float:
    """Of all runs but the first, which warms the disk."""
    return statistics.median([run(command).seconds for command in commands][1:])


if __name__ == "__main__":
    main()
