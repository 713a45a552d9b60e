"""Speed and memory of the whole pipeline on this machine, against llama.cpp and OpenVINO GenAI on the same GGUF.

    python benchmarks/speed.py models/demo [--gguf FILE] [--save DIR] [--parts decode ...]

It measures composing, decoding, reading prompts, time to the first token, cold start, peak memory, growth over 1,000
requests, and the server under several clients. llama.cpp takes part if `llama-cpp-python` is installed, OpenVINO GenAI
(decoding only) if `openvino-genai` is and reads the file. Our decoder and theirs take turns, round by round, in one
process with the same number of threads, so all see the same machine. They run alone, with one adapter and with three
of the same weights, llama.cpp with the blend as its LoRA file: that is the same work, and the ratio to look at. Each
round decodes the same 32 tokens after 128. The ratio moves by up to a tenth from process to process, with the layout of
memory. Decoding is therefore measured in several processes, and the median counts. The last line of the output is the
result as JSON.

Bundles of larger bases, with random adapters, are made by `benchmarks/bundles.py`:

    python benchmarks/bundles.py qwen2.5-coder-0.5b-instruct --rank 16
    python benchmarks/speed.py build/bundles/qwen2.5-coder-0.5b-instruct-source-16 --parts decode \\
        --gguf build/models/qwen2.5-coder-0.5b-instruct/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --rounds 6 --processes 3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.generation.blends import compose_blends, write_loras
from benchmarks.generation.latency import measure_compose, measure_first_token
from benchmarks.generation.rates import decode_in_processes, measure_decode, measure_prefill
from benchmarks.generation.server_load import measure_server
from benchmarks.generation.speed_table import print_table
from benchmarks.measuring import llama
from benchmarks.measuring.arguments import command_parser
from benchmarks.measuring.machine import machine, today
from benchmarks.measuring.prompts import PROMPT
from benchmarks.measuring.results import write_dated
from edgecompose import open_bundle
from edgecompose.bundle.files import read_manifest

PARTS = ("footprint", "server", "decode", "compose", "read")
GGUF = Path("build/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf")


def main() -> None:
    """Parse, measure, print."""
    parser = command_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path, default=GGUF, help="the base as GGUF, for llama.cpp")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured, by default all")
    parser.add_argument("--save", type=Path, help="folder for a dated JSON file")
    parser.add_argument("--name", default="speed", help="name of that file")
    parser.add_argument("--processes", type=int, default=5, help="in which decoding is measured")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one process of those
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure_decode(options.bundle, options.gguf, rounds=options.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print_table(result)
    if options.save:
        write_dated(options.save, options.name, result)
    print(json.dumps(result))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every number of the result; LoRA files go to `folder`."""
    bundle, gguf, rounds, parts = options.bundle, options.gguf, options.rounds, options.parts
    with open_bundle(bundle, device="cpu") as composer:
        blends = compose_blends(composer)
        loras = write_loras(blends, composer.bundle.manifest.base, folder) if llama.is_available(gguf) else {}
    result = measure_footprint(bundle, gguf, loras) if "footprint" in parts else {}
    if "server" in parts:
        result["server"] = measure_server(bundle)
    if "decode" in parts:
        result["decode_tokens_per_s"] = decode_in_processes(bundle, gguf, rounds=rounds, processes=options.processes)
    with open_bundle(bundle, device="cpu") as composer:
        composer.warm_up()
        if "compose" in parts:
            result["compose_ms"] = measure_compose(composer)
            result["first_token_ms"] = measure_first_token(composer)
        if "read" in parts:
            result["prefill_tokens_per_s"] = measure_prefill(composer, gguf, loras, rounds=max(3, rounds // 2))
    base = read_manifest(bundle).base
    kl = None if base.distance is None else base.distance.kl
    return {**result, "base": {"precision": base.precision, "kl": kl}, "machine": machine(), "date": today()}


def measure_footprint(bundle: Path, gguf: Path, loras: dict[str, Path]) -> dict[str, Any]:
    """The result of `footprint.py` in a process of its own."""
    script = Path(__file__).with_name("footprint.py")
    command = [sys.executable, str(script), str(bundle), "--prompt", PROMPT]
    if loras:
        command += ["--gguf", str(gguf), "--lora", str(loras["three_adapters"])]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


if __name__ == "__main__":
    main()
