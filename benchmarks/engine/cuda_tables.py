"""What `cuda.py` prints: a line a row, ratios first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.engine.batch_times import BatchRate
from benchmarks.engine.merge_parity import MethodParity
from benchmarks.engine.model_parity import DecoderParity, EmbedderParity
from benchmarks.engine.operators import Placement
from benchmarks.engine.times import COMPOSE_TARGET_MS, ComposeTime, DecodeRate, MergeTime

Parity = MethodParity | DecoderParity | EmbedderParity


def placement_line(row: Placement) -> str:
    """A graph, and the nodes of it that run elsewhere."""
    names = ", ".join(f"{count} {operator}" for operator, count in sorted(row.elsewhere.items()))
    return f"{sum(row.elsewhere.values()):9} {row.nodes:10}  {row.graph:24} {names}"


def parity_line(row: Parity) -> str:
    """The verdict on one comparison."""
    worst = f", worst: {row.worst}" if row.worst else ""
    if isinstance(row, MethodParity):
        text = f"{row.method} ({row.cases} cases{worst})"
    elif isinstance(row, DecoderParity):
        text = f"decoder of {row.base}, {row.blend}: {row.equal} of {row.tokens} tokens agree{worst}"
    else:
        text = f"embedder of {row.embedder}: {row.texts} texts{worst}"
    return f"{'ok' if row.passed else 'FAILED':6} {row.error:10.1e} {row.tolerance:10.0e}  {text}"


def failure_line(row: Parity) -> str:
    """A comparison that failed, in one line."""
    if isinstance(row, MethodParity):
        name = row.method
    elif isinstance(row, EmbedderParity):
        name = f"embedder of {row.embedder}"
    else:
        name = f"decoder of {row.base} with {row.blend}"
    return f"{name}: relative error {row.error:.2e}, {row.tolerance:.0e} is allowed ({row.worst})"


def could_run(row: Parity) -> bool:
    """Whether both sides gave finite results; other things are not timed."""
    return not math.isinf(row.error)


def merge_line(row: MergeTime) -> str:
    """One method under one load."""
    target = "" if row.target is None else f"{row.target:.0%} {'met' if row.of_copy >= row.target else 'no'}"
    load = row.load
    return (
        f"{row.faster:5.1f}x  {row.of_copy:6.1%} {target:>8} {row.method:16} {row.device.least:7.2f} "
        f"({row.device.median:7.2f}) {row.reference.least:9.2f} {row.gb_per_s:8.1f} {row.bytes_moved / 1e6:8.1f}  "
        f"{load.shapes}, {load.layers} layers, {load.adapters} adapters of rank {load.rank}, int{load.bits}"
    )


def compose_lines(rows: Sequence[ComposeTime]) -> list[str]:
    """Composing on the device against the CPU."""
    ours, theirs = rows
    lines = [f"\nfaster  compose, prompt to bound adapter (target on cuda {COMPOSE_TARGET_MS} ms)"]
    for name in ("new_blend", "cached_blend"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        times = f"{mine.least:8.2f} ms ({mine.median:.2f}), cpu {other.least:.2f} ({other.median:.2f})"
        lines.append(f"{other.least / mine.least:5.1f}x  {name:14} {times}")
    return lines


def decode_line(ours: DecodeRate, theirs: DecodeRate) -> str:
    """DecoderState under a blend of one rank on the device against the CPU."""
    ratio = f"{ours.median / theirs.median:5.1f}x"
    return f"{ratio}  {ours.base:8} {ours.rank:5} {ours.median:10.1f} {ours.best:8.1f} {theirs.median:9.1f}"


def batch_line(ours: BatchRate, theirs: BatchRate) -> str:
    """Several sequences on the device against the CPU."""
    ratios = f"{ours.tokens_per_s / theirs.tokens_per_s:5.1f}x  {ours.of_one:6.2f}x"
    return f"{ratios}  {ours.sequences:9} {ours.tokens_per_s:10.1f} {theirs.tokens_per_s:9.1f}  {ours.equal:5}"


def batch_failure(row: BatchRate) -> str:
    """Answers that company changed, in one line."""
    return f"{row.sequences} sequences on {row.device}: {row.sequences - row.equal} answers are not those alone"
