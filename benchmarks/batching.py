"""Several answers at once: tokens a second together, response times of the server, and memory of their caches.

    python benchmarks/batching.py models/demo [--parts batch server cache] [--save DIR]
    python benchmarks/batching.py BUNDLE --tokens 32 --rounds 1 --calls 16 --caches float32 int8 int4

`batch`: 1, 2, 4, 8 and 16 sequences through `Composer.batch`, under as many different blends of three adapters, under
one blend, and under none; greedy, without drafts, all of the same length. Ratios are to one sequence; sizes take turns.
`equal` counts the answers that are, text for text, those that the same sequence gets alone. `server`: p50 and p99 of a
call that is answered with 64 tokens, with 1, 4 and 8 clients. `cache`: peak memory beyond the loaded model of 8
sequences of 1,024 tokens, and tokens a second at that length, by kind of cache; float32 is the default, for others the
bundle is opened with `kv_cache`. A copy of the bundle whose base has no end token takes part, so that lengths are
equal. llama-cpp-python has no several sequences in a pass, so it does not take part. The last line of the output is
the result as JSON.

Bundles of larger bases, with random adapters, are made by `benchmarks/bundles.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.generation.batches import measure_batches
from benchmarks.generation.cache_memory import cache_in_this_process, measure_caches
from benchmarks.generation.server_load import CLIENTS, measure_server
from benchmarks.generation.speed_table import print_server
from benchmarks.measuring.arguments import command_parser
from benchmarks.measuring.bundles import without_end_tokens
from benchmarks.measuring.machine import machine, today
from benchmarks.measuring.requests import KINDS
from benchmarks.measuring.results import write_dated
from edgecompose import open_bundle

PARTS = ("batch", "server", "cache")


def main() -> None:
    """Parse, measure, print."""
    options = parser().parse_args()
    if options.worker:
        row = cache_in_this_process(options.bundle, options.worker, sequences=options.sequences, length=options.length)
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory(dir=options.bundle.resolve().parent) as folder:
        result = measure(without_end_tokens(options.bundle, Path(folder) / "bundle"), options)
    result |= {"bundle": options.bundle.name, "machine": machine(), "date": today()}
    print_table(result)
    if options.save:
        write_dated(options.save, options.name, result)
    print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = command_parser(__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of blends, in the part batch")
    options.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="numbers of sequences")
    options.add_argument("--tokens", type=int, default=96, help="of each answer in the part batch")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--calls", type=int, default=32, help="to the server, by all clients together")
    options.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    options.add_argument("--answer", type=int, default=64, help="tokens that the server writes")
    options.add_argument(
        "--caches", nargs="+", default=["float32"], help="kinds of KV cache, the first to compare with"
    )
    options.add_argument("--sequences", type=int, default=8, help="in the part cache")
    options.add_argument("--length", type=int, default=1024, help="tokens of each of those")
    options.add_argument("--save", type=Path, help="folder for a dated JSON file")
    options.add_argument("--name", default="batching", help="name of that file")
    options.add_argument("--worker", metavar="CACHE", help=argparse.SUPPRESS)
    return options


def measure(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The parts that were asked for."""
    result: dict[str, Any] = {}
    if "batch" in options.parts:
        with open_bundle(bundle, device="cpu") as composer:
            result["batch"] = measure_batches(
                composer, kinds=options.kinds, sizes=options.sizes, tokens=options.tokens, rounds=options.rounds
            )
    if "server" in options.parts:
        result["server"] = measure_server(bundle, calls=options.calls, tokens=options.answer, clients=options.clients)
    if "cache" in options.parts:
        result["cache"] = measure_caches(bundle, options.caches, sequences=options.sequences, length=options.length)
    return result


def print_table(result: dict[str, Any]) -> None:
    """The result for people, ratios first."""
    for kind, rows in result.get("batch", {}).items():
        print(f"{kind}: sequences, decode x one, with prompts x one, tokens/s of both, answers as alone")
        for size, ratio in rows["decode_ratio"].items():
            cells = [f"{size:4}", f"{ratio:6.2f} x", f"{rows['whole_ratio'][size]:6.2f} x"]
            cells += [f"{rows[f'{part}_tokens_per_s'][size]:7.1f}" for part in ("decode", "whole")]
            print("  ".join([*cells, f"{rows['equal_to_alone'][size]:.0f}"]))
    print_server(result.get("server", {}))
    for kind, row in result.get("cache", {}).items():
        print(
            f"cache {kind:8} {row['beyond_model_mb_ratio']:.2f} x memory, {row['tokens_per_s_ratio']:.2f} x tokens/s: "
            f"{row['beyond_model_mb']:.0f} MB beyond the model (float32 keys and values alone "
            f"{row['float32_cache_mb']:.0f}), {row['tokens_per_s']:.1f} tokens/s, "
            f"{row['equal_answers']} of {len(row['tokens'])} answers equal"
        )


if __name__ == "__main__":
    main()
