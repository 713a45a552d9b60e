"""CUDA against the CPU on this machine: are the results the same, and how fast are they.

    python benchmarks/cuda.py [--bundle models/demo] [--base build/base ...] [--save benchmarks/results]

Checks every merge method, the decoder and a float embedder on both devices, then times merging at the shapes of real
models, composing and decoding, against the copy bandwidth that ONNX Runtime reaches on the device. A wrong result is
named and ends in exit code 1, as does a machine without CUDA; a target that is missed does not. Prints tables, ratios
first, then one line of JSON. `--device cpu` puts the CPU in the place of CUDA, to try the script itself:

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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found as a script, however edgecompose is installed

from benchmarks import cuda_graphs, cuda_parity, cuda_timing
from benchmarks.merge import SHAPES
from benchmarks.speed import PROMPT, machine
from edgecompose.engine.device import Device, choose_device, installed_packages
from edgecompose.errors import EdgeComposeError
from edgecompose.merging.methods import METHODS

BUNDLE = Path("models/demo")
Parity = cuda_parity.MethodParity | cuda_parity.DecoderParity | cuda_parity.EmbedderParity


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, measure, print; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        device, reference = choose_device(options.device), choose_device("cpu")
        bases = find_bases(options.bundle, options.base)
    except EdgeComposeError as error:  # no CUDA, or a bundle that cannot be used
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"{device_name(device)} ({device.kind}) against {device_name(reference)} (cpu)")
    placed = show_placements(device, options.bundle, bases)
    parity = show_parity(device, reference, bases, options.bundle)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "device": device.kind, "device_name": device_name(device),
        "machine": machine(), "packages": installed_packages(), "rounds": options.rounds,
        "placement": placed, "parity": parity,
    }  # fmt: skip
    broken = [row for row in parity if math.isinf(row.error)]
    methods = [m for m in METHODS if all(not isinstance(r, cuda_parity.MethodParity) or r.method != m for r in broken)]
    running = [base for base in bases if all(getattr(row, "base", None) != base.name for row in broken)]
    result |= show_times(device, reference, methods, running, options)
    line = json.dumps(plain(result))
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / f"{result['date']}-{options.device}.json").write_text(line + "\n", encoding="utf-8")
    failures = [failure(row) for row in parity if not row.passed] + result.get("failed", [])
    for text in failures:
        print(f"FAILED: {text}", file=sys.stderr)
    print(line)
    return 1 if failures else 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--bundle", type=Path, default=BUNDLE)
    found.add_argument("--base", type=Path, nargs="+", default=[], help="folders of exported bases")
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script")
    found.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    found.add_argument("--layers", type=int, help="at most so many layers of each of the shapes")
    found.add_argument("--adapters", type=int, default=4)
    found.add_argument("--rank", type=int, default=16)
    found.add_argument("--bits", type=int, choices=(4, 8), default=4)
    found.add_argument("--rounds", type=int, default=10)
    found.add_argument("--save", type=Path, help="folder for a dated JSON file")
    return found


def find_bases(bundle: Path, folders: Sequence[Path]) -> list[cuda_parity.Base]:
    """The decoders to run: that of the bundle, if it is there, and those of exported folders."""
    found = [cuda_parity.Base.of_folder(folder) for folder in folders]
    if has_bundle(bundle):
        found.insert(0, cuda_parity.Base.of_bundle(bundle))
    else:
        print(f"skipped: there is no bundle at {bundle}; composing is not timed, nor its decoder checked", flush=True)
    return found


def has_bundle(folder: Path) -> bool:
    """Whether there is a bundle."""
    return (folder / "manifest.json").is_file()


def show_placements(device: Device, bundle: Path, bases: Sequence[cuda_parity.Base]) -> list[cuda_graphs.Placement]:
    """Print which nodes run elsewhere than on the device."""
    graphs = {f"decoder of {base.name}": base.graphs[device.kind] for base in bases}
    embedder = cuda_timing.embedder_graph(bundle, device) if has_bundle(bundle) else None
    graphs |= {} if embedder is None else {"embedder": embedder}
    found = list(cuda_graphs.placements(device, graphs))
    print(f"\nelsewhere   of nodes  graph (nodes that {device.kind} does not run: each costs copies)")
    for row in found:
        names = ", ".join(f"{count} {operator}" for operator, count in sorted(row.elsewhere.items()))
        print(f"{sum(row.elsewhere.values()):9} {row.nodes:10}  {row.graph:24} {names}", flush=True)
    return found


def show_parity(device: Device, reference: Device, bases: Sequence[cuda_parity.Base], bundle: Path) -> list[Parity]:
    """Print and return the worst of each method, of each decoder, and of the embedder if it runs on the device."""
    rows: list[Parity] = []
    print("\nparity      error  tolerance  method")
    for method in cuda_parity.merge_parity(device, reference):
        worst = f", worst: {method.worst}" if method.worst else ""
        print(f"{_verdict(method)} {method.method} ({method.cases} cases{worst})", flush=True)
        rows.append(method)
    for base in bases:
        for row in cuda_parity.decoder_parity(base, device, reference):
            shown = f"decoder of {row.base}, {row.blend}: {row.equal} of {row.tokens} tokens agree"
            print(f"{_verdict(row)} {shown}{f', worst: {row.worst}' if row.worst else ''}", flush=True)
            rows.append(row)
    for found in cuda_parity.embedder_parity(bundle, device, reference) if has_bundle(bundle) else ():
        worst = f", worst: {found.worst}" if found.worst else ""
        print(f"{_verdict(found)} embedder of {found.embedder}: {found.texts} texts{worst}", flush=True)
        rows.append(found)
    return rows


def _verdict(row: Parity) -> str:
    return f"{'ok' if row.passed else 'FAILED':6} {row.error:10.1e} {row.tolerance:10.0e} "


def failure(row: Parity) -> str:
    """What is wrong, in one line."""
    if isinstance(row, cuda_parity.MethodParity):
        name = row.method
    elif isinstance(row, cuda_parity.EmbedderParity):
        name = f"embedder of {row.embedder}"
    else:
        name = f"decoder of {row.base} with {row.blend}"
    return f"{name}: relative error {row.error:.2e}, {row.tolerance:.0e} is allowed ({row.worst})"


def show_times(
    device: Device,
    reference: Device,
    methods: Sequence[str],
    bases: Sequence[cuda_parity.Base],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Print and return what is timed: methods and decoders that run at all."""
    devices = (device, reference)
    copies = [cuda_graphs.copy_bandwidth(d, options.rounds) for d in devices]
    print()
    for d, copy in zip(devices, copies, strict=True):
        print(f"copy bandwidth, {d.kind}: {copy.best:.1f} GB/s ({copy.identity:.1f} Identity, {copy.add:.1f} Add)")
    found: dict[str, Any] = {"copy_gb_per_s": [copy.best for copy in copies], "copy": copies, "merge": []}
    print("\nfaster  of copy  target  method              ms  (median)    cpu ms     GB/s       MB  load")
    for load in cuda_timing.loads(options.shapes, options.layers, options.adapters, options.rank, options.bits):
        rows = cuda_timing.merge_times(load, methods, *devices, [copy.best for copy in copies], options.rounds)
        print(*map(_merge_line, rows), sep="\n", flush=True)
        found["merge"] += rows
    if has_bundle(options.bundle):
        try:
            found["compose"] = [cuda_timing.compose_time(options.bundle, d, PROMPT, options.rounds) for d in devices]
            _show_compose(found["compose"])
        except Exception as failed:  # a kernel of the embedder, say
            found["failed"] = [f"composing: {cuda_parity.described(failed)}"]
    rates = [[cuda_timing.decode_rates(base, d, options.rounds) for d in devices] for base in bases]
    found["decode"] = [row for pair in rates for rows in pair for row in rows]
    if rates:
        print("\nfaster  decode    rank   tokens/s  (best)       cpu")
    for ours, theirs in (pair for sides in rates for pair in zip(*sides, strict=True)):
        ratio = f"{ours.median / theirs.median:5.1f}x"
        print(f"{ratio}  {ours.base:8} {ours.rank:5} {ours.median:10.1f} {ours.best:8.1f} {theirs.median:9.1f}")
    return found


def _merge_line(row: cuda_timing.MergeTime) -> str:
    target = "" if row.target is None else f"{row.target:.0%} {'met' if row.of_copy >= row.target else 'no'}"
    load = row.load
    return (
        f"{row.faster:5.1f}x  {row.of_copy:6.1%} {target:>8} {row.method:16} {row.device.least:7.2f} "
        f"({row.device.median:7.2f}) {row.reference.least:9.2f} {row.gb_per_s:8.1f} {row.bytes_moved / 1e6:8.1f}  "
        f"{load.shapes}, {load.layers} layers, {load.adapters} adapters of rank {load.rank}, int{load.bits}"
    )


def _show_compose(rows: Sequence[cuda_timing.ComposeTime]) -> None:
    ours, theirs = rows
    print(f"\nfaster  compose, prompt to bound adapter (target on cuda {cuda_timing.COMPOSE_TARGET_MS} ms)")
    for name in ("new_blend", "cached_blend"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        ratio = f"{other.least / mine.least:5.1f}x"
        print(
            f"{ratio}  {name:14} {mine.least:8.2f} ms ({mine.median:.2f}), cpu {other.least:.2f} ({other.median:.2f})"
        )


def device_name(device: Device) -> str:
    """What the device is called, as far as can be found out."""
    if device.kind == "cpu":
        return str(machine()["processor"])
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return f"a CUDA device in {platform.node() or 'this machine'}, whose name nvidia-smi did not give"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "a CUDA device"


def plain(value: Any) -> Any:
    """What JSON can hold; a number that is not finite becomes its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)} | _derived(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _derived(value: Any) -> dict[str, Any]:
    """Properties worth keeping beside the fields."""
    return {name: getattr(value, name) for name in ("passed", "faster", "target", "best") if hasattr(value, name)}


if __name__ == "__main__":
    sys.exit(main())
