"""Merging against PEFT's `add_weighted_adapter`, on the same adapters in the same run.

    python benchmarks/merge.py --shapes smollm2-135m --adapters 4 --rank 16 --bits 4
    python benchmarks/merge.py --sweep --output benchmarks/results/2026-11-24-merge.json

The adapters are random; no base model is needed. PEFT gets the dequantised factors in float32 on modules without
weights. Times are the least of several rounds; ours and PEFT's take turns. `again` merges the adapters of an earlier
merge with other weights: sessions are open, buffers exist, and results that do not depend on the weights are cached
(sparsified codes, Gram matrices, bases). `new` merges adapters never seen before. Ratios are PEFT's time over `again`.
`floor` is the time to read the quantised bytes once and to write the result once. `extra` is the first round's peak of
resident memory less the result, in a process of its own (--memory). Prints a table, ratios first, then JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.measuring.adapters import SHAPES, random_adapter, slot_groups, stored_bytes
from benchmarks.measuring.arguments import command_parser
from benchmarks.measuring.memory import peak_growth
from benchmarks.measuring.results import write_result
from benchmarks.measuring.timing import Step, time_rounds
from benchmarks.merging.peft_merge import PEFT_METHODS, peft_merge, peft_model
from edgecompose.bundle.adapter import Adapter
from edgecompose.bundle.quantization import BITS
from edgecompose.engine.device import choose_device, runtime_version
from edgecompose.engine.merged import MergedAdapter
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import METHODS
from edgecompose.settings import MergeSettings

DENSITY = 0.5
ROUNDS = 5
_SLOW = ("svd",)
#: Shapes, layers, number of adapters, their rank and bits, and the device.
Case = Mapping[str, Any]
_CASE_OPTIONS = ("shapes", "layers", "adapters", "rank", "bits", "device")


def main() -> None:
    """Parse, measure, print."""
    options = parser().parse_args()
    print("  faster  over floor  method              again      new      PEFT   floor  result MB")
    rows = []
    for i, (case, methods) in enumerate(cases(options)):
        with_slow = case["layers"] == 1 or case["shapes"] == "smollm2-135m"
        measured = measure(case, methods, with_peft=not options.no_rival, with_slow_peft=with_slow)
        for row in measured if options.memory and i == 0 else ():
            row["extra_bytes"] = extra = extra_bytes_in_process(case, row["method"])
            print(f"{row['method']:16} beyond the result: {'unknown' if extra is None else f'{extra / 1e6:.1f} MB'}")
        rows += measured
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    result = {"machine": machine, "onnxruntime": runtime_version(), "rows": rows}
    if options.output:
        write_result(options.output, result, indent=1)
    print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = command_parser(__doc__)
    options.add_argument("--shapes", choices=list(SHAPES), default="smollm2-135m")
    options.add_argument("--layers", type=int, help="fewer layers than the model has")
    options.add_argument("--adapters", type=int, default=4)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--bits", type=int, choices=BITS, default=4)
    options.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu")
    options.add_argument("--method", action="append", choices=list(METHODS))
    options.add_argument("--sweep", action="store_true", help="vary rank, adapters, bits and shapes")
    options.add_argument("--no-rival", action="store_true", help="do not measure PEFT")
    options.add_argument(
        "--memory", action="store_true", help="measure the first case's peak memory, each method in its own process"
    )
    options.add_argument("--output", type=Path)
    return options


def cases(options: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """The cases to measure, each with its methods."""
    case = {name: getattr(options, name) for name in _CASE_OPTIONS}
    case["layers"] = options.layers or SHAPES[options.shapes][0]
    if not options.sweep:
        return [(case, options.method or list(METHODS))]
    quick = ["product", "linear", "ties", "magnitude_prune"]
    changes: list[tuple[Case, list[str]]] = [
        *(({"rank": rank}, quick) for rank in (8, 32, 64)),
        *(({"adapters": count}, quick) for count in (1, 2, 8, 16)),
        *(({"bits": bits}, quick) for bits in (8, 16)),
        ({"shapes": "llama-1b", "layers": 16}, quick),
        ({"shapes": "llama-1b", "layers": 1}, ["svd"]),
        ({"shapes": "llama-8b", "layers": 4}, quick),
    ]
    return [(case, list(METHODS)), *(({**case, **change}, methods) for change, methods in changes)]


def measure(case: Case, methods: Sequence[str], *, with_peft: bool, with_slow_peft: bool) -> list[dict[str, Any]]:
    """One row a method."""
    groups = slot_groups(case["shapes"], case["layers"])
    adapters = [random_adapter(i, groups, rank=case["rank"], bits=case["bits"]) for i in range(case["adapters"])]
    model = peft_model(adapters, groups) if with_peft else None
    rows = []
    for method in methods:
        compared = method in PEFT_METHODS and (with_slow_peft or method not in _SLOW)
        rows.append(_measure_method(case, method, adapters=adapters, model=model if compared else None))
        print(_line(rows[-1]), flush=True)
    return rows


class _Merges:
    """Merges of the same adapters by one method, each with weights or adapters that no cache holds."""

    def __init__(self, case: Case, method: str, adapters: Sequence[Adapter]) -> None:
        self._merger = Merger(choose_device(case["device"]))
        self._settings = MergeSettings(method, DENSITY)
        self._adapters = adapters
        self.weights: list[float] = (np.arange(len(adapters), 0, -1) / sum(range(len(adapters) + 1))).tolist()
        self._turns = iter(range(1000))

    def again(self) -> MergedAdapter:
        """The adapters of an earlier merge, with other weights."""
        turn = next(self._turns)
        return self._merger.merge(self._adapters, [w * (1 + 1e-3 * turn) for w in self.weights], self._settings)

    def new(self) -> MergedAdapter:
        """Adapters never seen before."""
        turn = next(self._turns)
        renamed = [replace(adapter, digest=f"{adapter.digest}-{turn}") for adapter in self._adapters]
        return self._merger.merge(renamed, self.weights, self._settings)


def _measure_method(case: Case, method: str, *, adapters: Sequence[Adapter], model: Any) -> dict[str, Any]:
    merges = _Merges(case, method, adapters)
    peak = peak_growth(merges.again)
    merged = merges.again()
    size, floor = merged.bytes, floor_ms(adapters, merged)
    del merged
    weights = dict(zip((adapter.name for adapter in adapters), merges.weights, strict=True))

    def merge_by_peft() -> None:
        peft_merge(model, weights, method=PEFT_METHODS[method], density=DENSITY, rank=case["rank"])

    ours, theirs = [], []
    for turn in range(ROUNDS):
        ours.append(least_ms(merges.again, 2))
        if model is not None and (turn == 0 or method not in _SLOW):
            theirs.append(least_ms(merge_by_peft, 1))
    row = {
        **case,
        "method": method,
        "floor_ms": floor,
        "result_bytes": size,
        "stored_bytes": stored_bytes(adapters),
        "extra_bytes": None if peak is None else peak - size,
        "ms": min(ours),
        "new_ms": least_ms(merges.new, 3),
        "over_floor": min(ours) / floor,
    }
    if theirs:
        row |= {"rival_ms": min(theirs), "faster": min(theirs) / row["ms"], "faster_new": min(theirs) / row["new_ms"]}
    return row


def least_ms(run: Step, rounds: int) -> float:
    """Milliseconds of the fastest round."""
    return time_rounds(run, rounds, warm_up=0).least


def floor_ms(adapters: Sequence[Adapter], merged: MergedAdapter) -> float:
    """Read the quantised bytes once, and write the result once into memory that exists already."""
    parts = [f.codes.reshape(-1) for a in adapters for m in a.modules.values() for f in (m.a, m.b)]
    words = [part[: part.size // 8 * 8].view(np.uint64) for part in parts]
    result = np.zeros(merged.bytes // 4, np.float32)

    def run() -> None:
        for part in words:
            part.max()
        result.fill(1.0)

    return least_ms(run, ROUNDS)


def extra_bytes_in_process(case: Case, method: str) -> int | None:
    """Bytes beyond the result at the peak of a first merge, in a process of its own."""
    command = [sys.executable, __file__, "--method", method, "--no-rival"]
    for option in _CASE_OPTIONS:
        command += [f"--{option}", str(case[option])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    extra = json.loads(done.stdout.splitlines()[-1])["rows"][0]["extra_bytes"]
    return None if extra is None else int(extra)


def _line(row: Case) -> str:
    faster = f"{row['faster']:7.1f}x" if "faster" in row else " " * 8
    theirs = f"{row['rival_ms']:9.1f}" if "rival_ms" in row else " " * 9
    return (
        f"{faster}  {row['over_floor']:6.1f}x  {row['method']:16} {row['ms']:8.1f} {row['new_ms']:8.1f} {theirs} "
        f"{row['floor_ms']:7.1f}  {row['result_bytes'] / 1e6:8.1f}  {row['shapes']}, {row['layers']} layers, "
        f"{row['adapters']} adapters of rank {row['rank']}, {row['bits']} bits"
    )


if __name__ == "__main__":
    main()
