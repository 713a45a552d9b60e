"""Cold start, peak memory and growth: what a process takes, ours beside llama.cpp's.

    python benchmarks/footprint.py models/demo [--gguf FILE --lora FILE]

`speed.py` runs it as a process of its own. A child's peak memory counts from its parent's size, and growth is
measured in a process in which nothing else happened. Prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.measuring.arguments import command_parser
from benchmarks.measuring.llama import LlamaCpp
from benchmarks.measuring.memory import resident_bytes
from benchmarks.measuring.processes import run
from benchmarks.measuring.prompts import LENGTHS
from edgecompose import EdgeComposeError, Request, open_bundle
from edgecompose.bundle.files import read_manifest
from edgecompose.engine.memory import release_freed_memory

EXECUTABLE = Path("dist/edgecompose/edgecompose")


def main() -> None:
    """Parse, measure, print."""
    parser = command_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default="Is this review positive or negative? I loved every minute of it.")
    parser.add_argument("--gguf", type=Path, help="the base as GGUF, for llama.cpp")
    parser.add_argument("--lora", type=Path, help="the blend of the bundle's first three adapters as GGUF")
    options = parser.parse_args()
    llama = None if options.gguf is None or options.lora is None else LlamaCpp(options.gguf, options.lora)
    result = {
        "cold_start_s": measure_cold_start(options.bundle, options.prompt, llama),
        "peak_memory_mb": measure_memory(options.bundle, options.prompt, llama),
        "resident_mb_after_requests": measure_growth(options.bundle),
    }
    print(json.dumps(result))


def measure_cold_start(bundle: Path, prompt: str, llama: LlamaCpp | None, runs: int = 7) -> dict[str, float]:
    """Median seconds from the start of a process on a warm disk.

    `compose` ends with a composed adapter in a file, retrieval included. `first_token` ends with an answer of one
    token. Both are run by the interpreter, and by the executable of `make binary` if that was built.
    `llama_cpp_first_token` is Python and llama.cpp with the same adapter already composed: the same number of tokens
    read, one written.
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
    if llama is not None:
        result["llama_cpp_first_token"] = _median([llama.command(64)] * (runs + 1))
    return result


def measure_memory(bundle: Path, prompt: str, llama: LlamaCpp | None) -> dict[str, Any]:
    """Peak resident MB of one answer of 8 tokens to prompts of several lengths.

    `retrieved` answers under the blend that retrieval chooses, `three_adapters` under three adapters by hand. llama.cpp
    has those three composed already. `graphs` is the size of the bundle's graphs with their data, `allowed` 200 MB
    more.
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
        if llama is not None:
            peaks["llama_cpp"][length] = run(llama.command(length)).peak_mb
    retrieving = [sys.executable, "-m", "edgecompose", "retrieve", str(bundle), prompt, "--device", "cpu"]
    return {"graphs": graphs, "allowed": graphs + 200, "retrieve": run(retrieving).peak_mb, **peaks}


def measure_growth(bundle: Path, requests: int = 1000) -> dict[str, float]:
    """Resident MB of this process after a tenth, half and all of many requests, most of them with a blend of their own.

    Freed memory that the C library holds goes back to the system before each look.

    Raises:
        SystemExit: a request failed, or the system does not report resident memory.
    """
    with open_bundle(bundle, device="cpu") as composer:
        names = sorted(composer.bundle.manifest.adapters)
        sizes: dict[str, float] = {}
        for turn in range(requests):
            chosen = [names[(turn * 7 + k * 5) % len(names)] for k in range(1 + turn % 3)]
            weights = dict.fromkeys(chosen, 0.3 + turn * 37 % 101 / 200)
            prompt = f"Number {turn}: is it true that{' the' * (turn * 13 % 90)}?"
            request = Request(weights=None if turn % 4 == 0 else weights, max_tokens=2, prompt_cache=turn % 2 == 0)
            try:
                composer.run(prompt, request)
            except EdgeComposeError as error:
                raise SystemExit(f"request {turn} failed: {error}") from error
            if turn + 1 in (requests // 10, requests // 2, requests):
                release_freed_memory()
                resident = resident_bytes()
                if resident is None:
                    raise SystemExit("resident memory is measured on Linux only")
                sizes[str(turn + 1)] = resident / 1e6
    return sizes


def _median(commands: list[list[str]]) -> float:
    """Median seconds of all runs but the first, which warms the disk."""
    return statistics.median([run(command).seconds for command in commands][1:])


if __name__ == "__main__":
    main()
