"""Attach or fuse: the cost of each on an exported base or a bundle, in turns in one process.

    python benchmarks/attachment.py build/base [--ranks 8 24 48 64] [--rounds N] [--save DIR]
    python benchmarks/attachment.py models/demo --pool 1 3 6 8


The blends are random adapters in all slots; speed depends on the rank, not on the values. Each round measures the
prefill of a prompt and decoding once for every variant, in an order that rotates: the base alone, a blend attached at
each rank, and a fused one if the base has the graphs for it. `fuse_ms` is the time to write a blend into the weights,
into memory that an earlier one used. `break_even_tokens` is the shortest answer that fusing makes faster, fusing and
prefill included. `--pool` adds blends of so many adapters of a bundle at equal weights, and the same cut by `svd` to
`--energy` of their squared norm: what rank is left says what the cut gains. Prints ratios to the base alone first
(medians of the ratio within a round), then milliseconds, then one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.measuring.adapters import random_adapter
from benchmarks.measuring.arguments import command_parser
from benchmarks.measuring.machine import machine, today
from benchmarks.measuring.memory import private_mb
from benchmarks.measuring.prompts import SHORT_PROMPT
from benchmarks.measuring.results import write_dated
from benchmarks.measuring.timing import elapsed_ms, median_ratio, medians
from edgecompose import Request, open_bundle
from edgecompose.bundle.files import read_manifest
from edgecompose.bundle.manifest import MANIFEST_FILE
from edgecompose.bundle.records import value_from_json
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoding.decoder import Decoder, FusedDecoder
from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.engine.device import choose_device
from edgecompose.engine.fusing import Fuser, fused_bytes
from edgecompose.engine.merged import MergedAdapter
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings

PROMPT_TOKENS, TOKENS = 64, 32
FUSE_RUNS = 7
Start = Callable[[], DecoderState]
Blends = Mapping[int, MergedAdapter]
Times = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The value of a call, its seconds, and the private memory that it added, in MB."""

    value: Any
    seconds: float
    memory_mb: float

    def session(self) -> dict[str, float]:
        """Its row in the result."""
        return {"load_s": self.seconds, "memory_mb": self.memory_mb}


def main() -> None:
    """Parse, measure, print."""
    parser = command_parser(__doc__)
    parser.add_argument("base", type=Path, help="a bundle, or a folder that 'edgecompose-export base' wrote")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 24, 48, 64])
    parser.add_argument("--pool", type=int, nargs="+", default=[], help="numbers of a bundle's adapters")
    parser.add_argument("--energy", type=float, default=0.99, help="share of the squared norm that svd keeps")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--save", type=Path, help="folder for a dated JSON file")
    options = parser.parse_args()
    spec = read_spec(options.base)
    pool = pool_blends(options.base, options.pool, options.energy) if options.pool else {}
    result = measure(options.base, spec, ranks=options.ranks, rounds=options.rounds, pool=pool)
    print_table(result)
    if options.save:
        write_dated(options.save, f"attachment-{spec.precision}", result)
    print(json.dumps(result))


def read_spec(folder: Path) -> BaseSpec:
    """The base of a bundle, or of a folder that `edgecompose-export base` wrote; paths are relative to the folder."""
    if (folder / MANIFEST_FILE).is_file():
        return read_manifest(folder).base
    content = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    return value_from_json(BaseSpec, content, "base.json")


def pool_blends(bundle: Path, counts: Sequence[int], energy: float) -> dict[str, MergedAdapter]:
    """Blends of the first adapters of a bundle at equal weights, exact and cut by svd."""
    methods = {"product": MergeSettings("product"), "svd": MergeSettings("svd", energy=energy)}
    with open_bundle(bundle, device="cpu") as composer:
        names = sorted(composer.bundle.manifest.adapters)
        return {
            f"pool_{count}_{method}": composer.compose(
                SHORT_PROMPT, Request(weights=dict.fromkeys(names[:count], 1 / count), merge=settings)
            ).merged
            for count in counts
            for method, settings in methods.items()
        }


def ranks_of(blend: MergedAdapter) -> dict[str, float]:
    """The largest rank of a blend's modules, and the mean over modules; a module has one rank in all layers."""
    ranks = [module.rank for module in blend.modules.values()]
    return {"largest": float(max(ranks, default=0)), "mean": statistics.fmean(ranks) if ranks else 0.0}


def measure(
    folder: Path, spec: BaseSpec, *, ranks: Sequence[int], rounds: int, pool: Mapping[str, MergedAdapter]
) -> dict[str, Any]:
    """Every number of one base; `pool` are blends to attach beside the random ones."""
    device = choose_device("cpu")
    merger, settings = Merger(device), MergeSettings()
    adapters = {rank: random_adapter(rank, spec.slots, rank=rank, bits=8) for rank in ranks}
    blends = {rank: merger.merge([adapter], [1.0], settings) for rank, adapter in adapters.items()}
    loaded = load(lambda: Decoder(folder / spec.graph, spec, device))
    result: dict[str, Any] = {
        "base": spec.source,
        "precision": spec.precision,
        "rounds": rounds,
        "can_fuse": spec.fusing is not None,
        "sessions": {"decoder": loaded.session()},
    }
    variants = attached_variants(loaded.value, {**{f"attach_{rank}": blend for rank, blend in blends.items()}, **pool})
    if pool:
        result["pool_ranks"] = {name: ranks_of(blend) for name, blend in pool.items()}
        result["discarded_energy"] = {name: blend.report.discarded_energy for name, blend in pool.items()}
    if spec.fusing is not None:
        start, numbers = prepare_fused(folder, spec, blends)
        variants["fuse"] = start
        result["sessions"] |= numbers.pop("sessions")
        result |= numbers
    result["prefill_ms"], result["decode_ms_per_token"] = measure_turns(variants, spec, rounds)
    if spec.fusing is not None:
        result["break_even_tokens"] = {rank: break_even(result, rank) for rank in ranks}
    return {**result, "machine": machine(), "date": today()}


def attached_variants(decoder: Decoder, blends: Mapping[str, MergedAdapter]) -> dict[str, Start]:
    """The base alone, and each blend attached to it."""
    named = {"base_alone": MergedAdapter({}, "base"), **blends}
    capacity = PROMPT_TOKENS + TOKENS
    return {name: lambda blend=blend: decoder.start(blend, capacity) for name, blend in named.items()}  # type: ignore[misc]


def prepare_fused(folder: Path, spec: BaseSpec, blends: Blends) -> tuple[Start, dict[str, Any]]:
    """Open the sessions and time fusing at each rank; the start of decoding under the last blend, and the numbers."""
    assert spec.fusing is not None
    device, graphs = choose_device("cpu"), spec.fusing
    fuse = load(lambda: Fuser(folder / graphs.fuse_graph, spec, device))
    decoder = load(lambda: FusedDecoder(folder / graphs.decoder_graph, spec, device))
    fusing: Fuser = fuse.value
    first = load(lambda: fusing.fuse(blends[min(blends)]))
    times: dict[int, list[float]] = {rank: [] for rank in blends}
    for _ in range(FUSE_RUNS):
        for rank, blend in blends.items():
            start = time.perf_counter()
            fusing.fuse(blend)
            times[rank].append(elapsed_ms(start))
    weights = fusing.fuse(list(blends.values())[-1])
    numbers = {
        "sessions": {"fuse": fuse.session(), "decoder_fused": decoder.session()},
        "fused_weights_mb": fused_bytes(graphs) / 1e6,
        "first_fuse_ms": first.seconds * 1e3,
        "fuse_ms": {rank: {"median": statistics.median(t), "best": min(t)} for rank, t in times.items()},
    }
    return lambda: decoder.value.start(weights, PROMPT_TOKENS + TOKENS), numbers


def measure_turns(variants: Mapping[str, Start], spec: BaseSpec, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prefill (ms) and decoding (ms a token) of each variant, taking turns."""
    ids = np.random.default_rng(0).integers(0, spec.vocabulary, PROMPT_TOKENS + TOKENS).tolist()
    states = {name: start() for name, start in variants.items()}
    prefill: dict[str, list[float]] = {name: [] for name in variants}
    decode: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):  # the first is a warm-up
        first = turn % len(variants)
        names = [*variants][first:] + [*variants][:first]
        for name in names:  # the order rotates, since each variant leaves the caches full of its own weights
            state = states[name]
            state.rewind(0)
            start = time.perf_counter()
            state.forward(ids[:PROMPT_TOKENS])
            middle = time.perf_counter()
            for token in ids[PROMPT_TOKENS:]:
                state.step([token])
            end = time.perf_counter()
            if turn:
                prefill[name].append((middle - start) * 1e3)
                decode[name].append((end - middle) * 1e3 / TOKENS)
    return summary(prefill), summary(decode)


def summary(times: Times) -> dict[str, Any]:
    """Ratios to the base alone, medians and least values."""
    return {
        "ratio": {name: median_ratio(values, times["base_alone"]) for name, values in times.items()},
        "median": medians(times),
        "best": {name: min(values) for name, values in times.items()},
    }


def break_even(result: Mapping[str, Any], rank: int) -> float | None:
    """Tokens of the shortest answer that fusing makes faster, the fusing included; None if no answer is."""
    prefill, decode = result["prefill_ms"]["median"], result["decode_ms_per_token"]["median"]
    gain = decode[f"attach_{rank}"] - decode["fuse"]
    cost = result["fuse_ms"][rank]["median"] + prefill["fuse"] - prefill[f"attach_{rank}"]
    return max(0.0, float(cost / gain)) if gain > 0 else None


def load(open_it: Callable[[], Any]) -> Loaded:
    """Call a function, and measure its time and memory."""
    before, start = private_mb(), time.perf_counter()
    value = open_it()
    seconds = time.perf_counter() - start
    return Loaded(value, seconds, private_mb() - before)


def print_table(result: Mapping[str, Any]) -> None:
    """The result for people."""
    decode, prefill = result["decode_ms_per_token"], result["prefill_ms"]
    print(f"{result['base']}, {result['precision']}: times the base alone")
    print(f"{'':14}  {'decode':>8}  {'prefill':>8}  {'ms/token':>9}  {f'prefill of {PROMPT_TOKENS}, ms':>18}")
    for name, ratio in decode["ratio"].items():
        cells = f"{ratio:8.3f}  {prefill['ratio'][name]:8.3f}  {decode['median'][name]:9.2f}"
        rank = result.get("pool_ranks", {}).get(name)
        left = "" if rank is None else f"   rank {rank['largest']:.0f}, mean {rank['mean']:.1f}"
        print(f"{name:14}  {cells}  {prefill['median'][name]:18.1f}{left}")
    for rank, times in result.get("fuse_ms", {}).items():
        tokens = result["break_even_tokens"][rank]
        gain = "never pays" if tokens is None else f"pays from {tokens:.0f} tokens on"
        print(f"fusing rank {rank:3}: {times['median']:.0f} ms (best {times['best']:.0f}), {gain}")
    for name, session in result["sessions"].items():
        print(f"session {name:15} {session['load_s']:6.2f} s to load, {session['memory_mb']:6.0f} MB of its own")
    if result["can_fuse"]:
        print(f"fused weights {result['fused_weights_mb']:.0f} MB, the first fuse {result['first_fuse_ms']:.0f} ms")
    else:
        print("this base has no graphs for fusing")


if __name__ == "__main__":
    main()
