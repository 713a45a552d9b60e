"""CUDA against the CPU on this machine: whether the results agree, and the speed of both.

    python benchmarks/cuda.py [--bundle models/demo] [--base build/base ...] [--save benchmarks/results]

Checks every merge method, the decoder and a float embedder on both devices. Then it times merging at the shapes of real
models, composing and decoding, against the copy bandwidth that ONNX Runtime reaches on the device, and the answers of
1, 8 and 32 sequences at once, each under a blend of its own; none may differ from what it is alone. A wrong result is
named and ends in exit code 1. A machine without CUDA ends in exit code 1 too; a missed target does not. Prints tables,
ratios first, then one line of JSON. `--device cpu` puts the CPU in the place of CUDA, to try the script itself:

    python benchmarks/cuda.py --device cpu --shapes smollm2-135m --rounds 1 --layers 2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.engine import batch_times, cuda_tables, merge_parity, model_parity, operators, times
from benchmarks.engine.bases import Base
from benchmarks.engine.cuda_tables import Parity
from benchmarks.engine.parity import one_line
from benchmarks.measuring.adapters import SHAPES
from benchmarks.measuring.arguments import command_parser
from benchmarks.measuring.machine import machine, today
from benchmarks.measuring.prompts import PROMPT
from benchmarks.measuring.results import write_dated
from edgecompose.engine.device import Device, choose_device, installed_packages
from edgecompose.errors import EdgeComposeError
from edgecompose.merging.methods import METHODS

BUNDLE = Path("models/demo")
#: The device under test, and the CPU.
Devices = tuple[Device, Device]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, measure, print; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        devices = device, reference = choose_device(options.device), choose_device("cpu")
        bases = open_bases(options.bundle, options.base)
    except EdgeComposeError as error:  # no CUDA, or a bundle that cannot be used
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"{device_name(device)} ({device.kind}) against {device_name(reference)} (cpu)")
    placement = show_placements(device, options.bundle, bases)
    parity = show_parity(devices, bases=bases, bundle=options.bundle)
    result: dict[str, Any] = {
        "date": today(),
        "device": device.kind,
        "device_name": device_name(device),
        "machine": machine(),
        "packages": installed_packages(),
        "rounds": options.rounds,
        "placement": placement,
        "parity": parity,
        **show_times(devices, bases=bases, parity=parity, options=options),
    }
    content = plain(result)
    if options.save:
        write_dated(options.save, options.device, content)
    failures = [cuda_tables.failure_line(row) for row in parity if not row.passed] + result.get("failed", [])
    for text in failures:
        print(f"FAILED: {text}", file=sys.stderr)
    print(json.dumps(content))
    return 1 if failures else 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = command_parser(__doc__)
    options.add_argument("--bundle", type=Path, default=BUNDLE)
    options.add_argument("--base", type=Path, nargs="+", default=[], help="folders of exported bases")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script")
    options.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options.add_argument("--layers", type=int, help="at most so many layers of each of the shapes")
    options.add_argument("--adapters", type=int, default=4)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--bits", type=int, choices=(4, 8), default=4)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--sequences", type=int, nargs="+", default=list(batch_times.SIZES), help="written at once")
    options.add_argument("--save", type=Path, help="folder for a dated JSON file")
    return options


def open_bases(bundle: Path, folders: Sequence[Path]) -> list[Base]:
    """The decoders to run: that of the bundle, if it exists, and those of exported folders."""
    bases = [Base.of_folder(folder) for folder in folders]
    if has_bundle(bundle):
        bases.insert(0, Base.of_bundle(bundle))
    else:
        print(f"skipped: there is no bundle at {bundle}; composing is not timed, nor its decoder checked", flush=True)
    return bases


def has_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle."""
    return (folder / "manifest.json").is_file()


def show_placements(device: Device, bundle: Path, bases: Sequence[Base]) -> list[operators.Placement]:
    """Print and return the nodes of each graph that run elsewhere than on the device."""
    graphs = {f"decoder of {base.name}": base.graphs[device.kind] for base in bases}
    embedder = times.embedder_graph(bundle, device) if has_bundle(bundle) else None
    graphs |= {} if embedder is None else {"embedder": embedder}
    rows = list(operators.placements(device, graphs))
    print(f"\nelsewhere   of nodes  graph (nodes that {device.kind} does not run: each costs copies)")
    print(*map(cuda_tables.placement_line, rows), sep="\n", flush=True)
    return rows


def show_parity(devices: Devices, *, bases: Sequence[Base], bundle: Path) -> list[Parity]:
    """Print and return the worst of each method, of each decoder, and of the embedder if it runs on the device."""
    rows: list[Parity] = []

    def show(row: Parity) -> None:
        print(cuda_tables.parity_line(row), flush=True)
        rows.append(row)

    print("\nparity      error  tolerance  method")
    for method in merge_parity.merge_parity(*devices):
        show(method)
    for base in bases:
        for decoder in model_parity.decoder_parity(base, *devices):
            show(decoder)
    for embedder in model_parity.embedder_parity(bundle, *devices) if has_bundle(bundle) else ():
        show(embedder)
    return rows


def show_times(
    devices: Devices, *, bases: Sequence[Base], parity: Sequence[Parity], options: argparse.Namespace
) -> dict[str, Any]:
    """Print and return the times of all methods and decoders that ran."""
    broken = [row for row in parity if not cuda_tables.could_run(row)]
    methods = [name for name in METHODS if all(getattr(row, "method", None) != name for row in broken)]
    running = [base for base in bases if all(getattr(row, "base", None) != base.name for row in broken)]
    copies = [operators.copy_bandwidth(device, options.rounds) for device in devices]
    print()
    for device, copy in zip(devices, copies, strict=True):
        print(f"copy bandwidth, {device.kind}: {copy.best:.1f} GB/s ({copy.identity:.1f} Identity, {copy.add:.1f} Add)")
    result: dict[str, Any] = {"copy_gb_per_s": [copy.best for copy in copies], "copy": copies}
    result["merge"] = show_merges(devices, methods, copies=result["copy_gb_per_s"], options=options)
    if has_bundle(options.bundle):
        result |= show_compose(devices, options)
    result["decode"] = show_decode(devices, running, options.rounds)
    if has_bundle(options.bundle):
        result["batch"] = show_batches(devices, options)
        wrong = [cuda_tables.batch_failure(row) for row in result["batch"] if not row.passed]
        result["failed"] = result.get("failed", []) + wrong
    return result


def show_merges(
    devices: Devices, methods: Sequence[str], *, copies: Sequence[float], options: argparse.Namespace
) -> list[times.MergeTime]:
    """Print and return the time of each method at each of the shapes."""
    rows: list[times.MergeTime] = []
    print("\nfaster  of copy  target  method              ms  (median)    cpu ms     GB/s       MB  load")
    for shapes in options.shapes:
        load = times.Load(
            shapes,
            layers=times.capped_layers(shapes, options.layers),
            adapters=options.adapters,
            rank=options.rank,
            bits=options.bits,
        )
        part = times.merge_times(load, methods, devices=devices, copies=copies, rounds=options.rounds)
        print(*map(cuda_tables.merge_line, part), sep="\n", flush=True)
        rows += part
    return rows


def show_compose(devices: Devices, options: argparse.Namespace) -> dict[str, Any]:
    """Print and return the times of composing with the bundle, or its failure."""
    try:
        rows = [times.compose_time(options.bundle, device, prompt=PROMPT, rounds=options.rounds) for device in devices]
    except Exception as failure:  # a kernel of the embedder, for example
        return {"failed": [f"composing: {one_line(failure)}"]}
    print(*cuda_tables.compose_lines(rows), sep="\n")
    return {"compose": rows}


def show_decode(devices: Devices, bases: Sequence[Base], rounds: int) -> list[times.DecodeRate]:
    """Print and return the rates of all decoders: for each base, those of the device and then those of the CPU."""
    rates = [[times.decode_rates(base, device, rounds) for device in devices] for base in bases]
    if rates:
        print("\nfaster  decode    rank   tokens/s  (best)       cpu")
    for sides in rates:
        print(*(cuda_tables.decode_line(*pair) for pair in zip(*sides, strict=True)), sep="\n")
    return [row for sides in rates for rows in sides for row in rows]


def show_batches(devices: Devices, options: argparse.Namespace) -> list[batch_times.BatchRate]:
    """Print and return the rates of several sequences at once: those of the device, then those of the CPU."""
    rounds = min(options.rounds, 3)
    sides = [
        batch_times.batch_rates(options.bundle, device, rounds=rounds, sizes=options.sequences) for device in devices
    ]
    print("\nfaster  of one  sequences   tokens/s       cpu  equal to alone")
    print(*(cuda_tables.batch_line(*pair) for pair in zip(*sides, strict=True)), sep="\n")
    return [row for rows in sides for row in rows]


def device_name(device: Device) -> str:
    """The name of the device, as far as the system reports it."""
    if device.kind == "cpu":
        return str(machine()["processor"])
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return f"a CUDA device in {platform.node() or 'this machine'}, whose name nvidia-smi did not give"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "a CUDA device"


def plain(value: Any) -> Any:
    """A value as JSON can hold it; a number that is not finite becomes its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)} | _derived(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _derived(value: Any) -> dict[str, Any]:
    """Properties that belong in the result beside the fields."""
    return {name: getattr(value, name) for name in ("passed", "faster", "target", "best") if hasattr(value, name)}


if __name__ == "__main__":
    sys.exit(main())
