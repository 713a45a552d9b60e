"""Real bases: export, size, distance, speed and memory of each, against llama.cpp on the same GGUF.

    python benchmarks/bases.py qwen2.5-coder-0.5b-instruct FILE.gguf [--precisions source auto] [--only export|speed]
    python benchmarks/llama7b.py build/models/llama-2-7b-random
    python benchmarks/bases.py llama-2-7b-random --precisions int8 --rank 64

A base is a GGUF file, a Hugging Face folder, or the name of a folder below build/models. A fresh process exports it at
each precision; its time and peak memory are measured. Then the base decodes and reads, alone and with a blend of three
random adapters in all linear modules. llama.cpp (`pip install llama-cpp-python`) does the same, with the blend as its
LoRA file. Both take turns in the same processes. DecoderState is greedy, 64 tokens after a prompt of 128. Reported are
medians over rounds, then over processes. Peak memory is that of a process which reads 128 tokens and writes 8, less the
size of its graph or GGUF file. Beside it stands the memory that is no page of a file. ONNX Runtime copies the weights
into the order that its kernels read, and the pages of the file count until the system takes them back.

Results go to benchmarks/results/bases.json after every step. A step with a result is skipped, unless `--again`. The
program prints a table of all results in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.export.base_speed import Effort, measure_speed, speed_in_this_process
from benchmarks.export.bases import Exported, Source, find_source, measure_export, write_adapters
from benchmarks.export.bases_table import print_table
from benchmarks.measuring.arguments import command_parser
from benchmarks.measuring.results import read_result, write_result

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bases.json"


def main() -> None:
    """Parse, measure what is missing, print."""
    options = parser().parse_args()
    effort = Effort(options.rank, options.rounds, options.processes)
    if options.worker == "adapters":
        write_adapters(Exported.open(options.work), effort.rank, for_llama=options.gguf is not None)
    elif options.worker == "speed":
        print(json.dumps(speed_in_this_process(Exported.open(options.work), options.gguf, effort)))
    else:
        failures = measure(options, effort)
        print_table(read_result(options.results))
        if failures:
            raise SystemExit("\n".join(failures))


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = command_parser(__doc__)
    options.add_argument("bases", nargs="*", metavar="BASE", help="GGUF file, Hugging Face folder, or name")
    options.add_argument("--precisions", nargs="+", default=["source", "auto"], help="those of edgecompose-export base")
    options.add_argument("--only", choices=["export", "speed"], help="one of the two steps")
    options.add_argument("--again", action="store_true", help="measure steps that have a result as well")
    options.add_argument("--rank", type=int, default=16, help="of each of the three adapters")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--processes", type=int, default=5, help="in which speed is measured")
    options.add_argument("--work", type=Path, default=ROOT / "build" / "bases", help="folder for exported bases")
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--worker", choices=["adapters", "speed"], help=argparse.SUPPRESS)
    options.add_argument("--gguf", type=Path, help=argparse.SUPPRESS)
    return options


def measure(options: argparse.Namespace, effort: Effort) -> list[str]:
    """Every step that is missing, each saved when it is done; one line a failure."""
    failures = []
    for source in map(find_source, options.bases):
        for precision in options.precisions:
            try:
                _measure_one(source, precision, options=options, effort=effort)
            except SystemExit as error:  # the other bases are still measured
                failures.append(f"{source.name} {precision} failed: {str(error).strip().splitlines()[-1]}")
                print(failures[-1], file=sys.stderr)
    return failures


def _measure_one(source: Source, precision: str, *, options: argparse.Namespace, effort: Effort) -> None:
    key, folder = f"{source.name} {precision}", options.work / f"{source.name}-{precision}"
    row = read_result(options.results).get(key, {})
    rank = row.get("speed", {}).get("adapters", {}).get("rank")
    needs_speed = options.only != "export" and (options.again or rank != effort.rank)
    needs_export = options.only != "speed" and (options.again or "export" not in row)
    if needs_export or (needs_speed and not (folder / "base.json").is_file()):
        print(f"== {key}: exporting", file=sys.stderr)
        _save(options.results, key, {"export": measure_export(source, precision, folder)})
    if needs_speed:
        print(f"== {key}: speed and memory", file=sys.stderr)
        _save(options.results, key, {"speed": measure_speed(source, Exported.open(folder), effort)})


def _save(path: Path, key: str, part: dict[str, Any]) -> None:
    """Put a part of a row into the file."""
    rows = read_result(path)
    rows[key] = rows.get(key, {}) | part
    write_result(path, rows, indent=1, sort_keys=True)


if __name__ == "__main__":
    main()
