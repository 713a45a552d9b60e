"""Speed and memory of the whole pipeline on this machine, against llama.cpp on the same GGUF.

    python benchmarks/speed.py models/demo [--gguf FILE] [--save DIR]

It measures composing, decoding, reading prompts, time to the first token, cold start, peak memory, growth over 1,000
requests, and the server under several clients. llama.cpp takes part if `llama-cpp-python` is installed. Our decoder and
llama.cpp take turns, round by round, in one process with the same number of threads, so both see the same machine.
llama.cpp runs alone, and with the same blends as LoRA files: that is the same work, and the ratio to look at. The ratio
moves by up to a tenth from process to process, with the layout of memory. DecoderState is therefore measured in several
processes, and the median counts. The last line of the output is the result as JSON.
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

GGUF = Path("build/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf")


def main() -> None:
    """Parse, measure, print."""
    parser = command_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path, default=GGUF, help="the base as GGUF, for llama.cpp")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--save", type=Path, help="folder for a dated JSON file")
    parser.add_argument("--name", default="speed", help="name of that file")
    parser.add_argument("--processes", type=int, default=5, help="in which decoding is measured")
    parser.add_argument("--only-decode", action="store_true", help="one process of those; prints its JSON")
    options = parser.parse_args()
    if options.only_decode:
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
    bundle, gguf, rounds = options.bundle, options.gguf, options.rounds
    with open_bundle(bundle, device="cpu") as composer:
        blends = compose_blends(composer)
        loras = write_loras(blends, composer.bundle.manifest.base, folder) if llama.is_available(gguf) else {}
    result = measure_footprint(bundle, gguf, loras)
    result["server"] = measure_server(bundle)
    result["decode_tokens_per_s"] = decode_in_processes(bundle, gguf, rounds=rounds, processes=options.processes)
    with open_bundle(bundle, device="cpu") as composer:
        composer.warm_up()
        result["compose_ms"] = measure_compose(composer)
        result["prefill_tokens_per_s"] = measure_prefill(composer, gguf, loras, rounds=max(3, rounds // 4))
        result["first_token_ms"] = measure_first_token(composer)
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
