"""Attach or fold: what each costs on an exported base, in turns in one process.

    python benchmarks/attachment.py build/base [--ranks 8 16 48] [--rounds N] [--save DIR]

The blends are random adapters in all slots; the rank decides the speed, not the values. Each round measures the prefill
of a prompt and decoding once for every contender, in an order that rotates: the base alone, a blend attached at each
rank, and a folded one if the base can be folded. `fold_ms` is the time to write a blend into the weights, into memory
that an earlier fold used; `break_even_tokens` is the length of an answer from which on fold is faster, folding and
prefill included. Prints ratios to the base alone first (medians of the ratio within a round), then milliseconds, then
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found as a script, however edgecompose is installed

from benchmarks.merge import random_adapter
from benchmarks.speed import machine
from edgecompose.bundle.manifest import BaseSpec
from edgecompose.bundle.records import value_from_json
from edgecompose.engine.decoder import Decoder, Decoding, FoldedDecoder
from edgecompose.engine.device import Device, choose_device
from edgecompose.engine.fusing import Folding, folded_bytes
from edgecompose.engine.merged import MergedAdapter
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import MergeSettings

PROMPT_TOKENS, TOKENS = 64, 32
Start = Callable[[], Decoding]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder that 'edgecompose-export base' wrote")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 48])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--save", type=Path, help="folder for a dated JSON file")
    options = parser.parse_args()
    content = json.loads((options.base / "base.json").read_text(encoding="utf-8"))
    spec = value_from_json(BaseSpec, content, "base.json")
    result = measure(options.base, spec, options.ranks, options.rounds)
    print_table(result)
    line = json.dumps(result)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        path = options.save / f"{result['date']}-attachment-{spec.precision}.json"
        path.write_text(line + "\n", encoding="utf-8")
    print(line)


def measure(folder: Path, spec: BaseSpec, ranks: Sequence[int], rounds: int) -> dict[str, Any]:
    """Every number of one base."""
    device, merger = choose_device("cpu"), Merger(choose_device("cpu"))
    blends = {rank: merger.merge([random_adapter(rank, spec.slots, rank, 8)], [1.0], MergeSettings()) for rank in ranks}
    decoder, seconds, memory = timed(lambda: Decoder(folder / spec.graph, spec, device))
    result: dict[str, Any] = {
        "base": spec.source, "precision": spec.precision, "rounds": rounds, "can_fold": spec.folding is not None,
        "sessions": {"decoder": {"load_s": seconds, "memory_mb": memory}},
    }  # fmt: skip
    room = PROMPT_TOKENS + TOKENS
    contenders: dict[str, Start] = {"base_alone": lambda: decoder.start(MergedAdapter({}, "base"), room)}
    for rank, blend in blends.items():
        contenders[f"attach_{rank}"] = lambda blend=blend: decoder.start(blend, room)  # type: ignore[misc]
    if spec.folding is not None:
        contenders["fold"] = prepare_fold(folder, spec, device, blends, result)
    result["prefill_ms"], result["decode_ms_per_token"] = measure_turns(contenders, spec, rounds)
    if spec.folding is not None:
        result["break_even_tokens"] = {rank: break_even(result, rank) for rank in ranks}
    return {**result, "machine": machine(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def prepare_fold(
    folder: Path, spec: BaseSpec, device: Device, blends: dict[int, MergedAdapter], result: dict[str, Any]
) -> Start:
    """Open the sessions of fold and time folding at each rank; decoding of the last blend."""
    assert spec.folding is not None
    fold_graph, decoder_graph = folder / spec.folding.fold_graph, folder / spec.folding.decoder_graph
    folding, seconds, memory = timed(lambda: Folding(fold_graph, spec, device))
    result["sessions"]["fold"] = {"load_s": seconds, "memory_mb": memory}
    folded, seconds, memory = timed(lambda: FoldedDecoder(decoder_graph, spec, device))
    result["sessions"]["decoder_folded"] = {"load_s": seconds, "memory_mb": memory}
    result["folded_weights_mb"] = folded_bytes(spec.folding) / 1e6
    result["first_fold_ms"] = timed(lambda: folding.fold(blends[min(blends)]))[1] * 1e3
    times: dict[int, list[float]] = {rank: [] for rank in blends}
    for _ in range(7):
        for rank, blend in blends.items():
            times[rank].append(timed(lambda blend=blend: folding.fold(blend))[1] * 1e3)  # type: ignore[misc]
    result["fold_ms"] = {rank: {"median": statistics.median(t), "best": min(t)} for rank, t in times.items()}
    weights = folding.fold(list(blends.values())[-1])
    return lambda: folded.start(weights, PROMPT_TOKENS + TOKENS)


def measure_turns(contenders: dict[str, Start], spec: BaseSpec, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prefill (ms) and decoding (ms a token) of each contender, taking turns."""
    ids = np.random.default_rng(0).integers(0, spec.vocabulary, PROMPT_TOKENS + TOKENS).tolist()
    decodings = {name: start() for name, start in contenders.items()}
    prefill: dict[str, list[float]] = {name: [] for name in contenders}
    decode: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):  # the first is a warm-up
        names = [*contenders][turn % len(contenders) :] + [*contenders][: turn % len(contenders)]
        for name in names:  # who follows whom changes, since each leaves the caches full of its own weights
            decoding = decodings[name]
            decoding.rewind(0)
            start = time.perf_counter()
            decoding.forward(ids[:PROMPT_TOKENS])
            middle = time.perf_counter()
            for token in ids[PROMPT_TOKENS:]:
                decoding.forward([token])
            end = time.perf_counter()
            if turn:
                prefill[name].append((middle - start) * 1e3)
                decode[name].append((end - middle) * 1e3 / TOKENS)
    return summary(prefill), summary(decode)


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios to the base alone, medians and least values."""
    alone = times["base_alone"]
    ratios = {n: statistics.median(a / b for a, b in zip(t, alone, strict=True)) for n, t in times.items()}
    return {
        "ratio": ratios, "median": {n: statistics.median(t) for n, t in times.items()},
        "best": {n: min(t) for n, t in times.items()},
    }  # fmt: skip


def break_even(result: dict[str, Any], rank: int) -> float | None:
    """Tokens of an answer from which on fold is faster, folding included; None where it never is."""
    prefill, decode = result["prefill_ms"]["median"], result["decode_ms_per_token"]["median"]
    gain = decode[f"attach_{rank}"] - decode["fold"]
    cost = result["fold_ms"][rank]["median"] + prefill["fold"] - prefill[f"attach_{rank}"]
    return max(0.0, float(cost / gain)) if gain > 0 else None


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its seconds, and by how many MB it left private memory larger (0 where Linux is not)."""
    before, start = private_mb(), time.perf_counter()
    value = run()
    seconds = time.perf_counter() - start
    return value, seconds, private_mb() - before


def private_mb() -> float:
    """Resident memory that is not a file's."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon"))


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    decode, prefill = result["decode_ms_per_token"], result["prefill_ms"]
    print(f"{result['base']}, {result['precision']}: times the base alone")
    print(f"{'':12}  {'decode':>8}  {'prefill':>8}  {'ms/token':>9}  {f'prefill of {PROMPT_TOKENS}, ms':>18}")
    for name, ratio in decode["ratio"].items():
        shown = f"{ratio:8.3f}  {prefill['ratio'][name]:8.3f}  {decode['median'][name]:9.2f}"
        print(f"{name:12}  {shown}  {prefill['median'][name]:18.1f}")
    for rank, spent in result.get("fold_ms", {}).items():
        tokens = result["break_even_tokens"][rank]
        shown = "never pays" if tokens is None else f"pays from {tokens:.0f} tokens on"
        print(f"folding rank {rank:3}: {spent['median']:.0f} ms (best {spent['best']:.0f}), {shown}")
    for name, session in result["sessions"].items():
        print(f"session {name:15} {session['load_s']:6.2f} s to load, {session['memory_mb']:6.0f} MB of its own")
    if result["can_fold"]:
        print(f"folded weights {result['folded_weights_mb']:.0f} MB, the first fold {result['first_fold_ms']:.0f} ms")
    else:
        print("this base cannot be folded")


if __name__ == "__main__":
    main()
