"""Times of two devices: merging at the shapes of real models, composing, and decoding under blends."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.bases import Base
from benchmarks.measuring.adapters import SHAPES, gaussian_adapter, random_adapter, slot_groups, stored_bytes
from benchmarks.measuring.decoders import token_steps
from benchmarks.measuring.timing import Timing, time_rounds
from edgecompose.bundle.files import Bundle
from edgecompose.bundle.quantization import Bits
from edgecompose.composer import Composer
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import Device
from edgecompose.merging.merger import Merger
from edgecompose.request import Request
from edgecompose.retrieval.embedder import embedder_device
from edgecompose.settings import MergeSettings, RetrievalSettings

#: Targets on CUDA: a prompt to a bound adapter, and merging at 8B shapes as a share of the copy bandwidth.
COMPOSE_TARGET_MS = 1.5
MERGE_TARGET, MERGE_TARGET_SHAPES = 0.6, "llama-8b"
#: Ranks of the blends under which decoding is timed, as the ranks of the adapters that make them up.
BLENDS = {0: (), 16: (16,), 48: (16, 16, 16)}
TOKENS = 32


@dataclass(frozen=True, slots=True)
class Load:
    """The adapters of a merge."""

    shapes: str
    layers: int
    adapters: int
    rank: int
    bits: Bits


@dataclass(frozen=True, slots=True)
class MergeTime:
    """One method on both devices. `bytes_moved`: the quantised bytes read once and the result written once."""

    load: Load
    method: str
    device: Timing
    reference: Timing
    bytes_moved: int
    gb_per_s: float
    of_copy: float
    reference_of_copy: float

    @property
    def faster(self) -> float:
        """Time on the reference over time on the device, least rounds."""
        return self.reference.least / self.device.least

    @property
    def target(self) -> float | None:
        """The target as a share of the copy bandwidth; None for most shapes."""
        return MERGE_TARGET if self.load.shapes == MERGE_TARGET_SHAPES else None


@dataclass(frozen=True, slots=True)
class ComposeTime:
    """Milliseconds from a prompt to an adapter that is bound to the decoder, of one device."""

    device: str
    new_blend: Timing
    cached_blend: Timing


@dataclass(frozen=True, slots=True)
class DecodeRate:
    """Tokens a second of one device, by rank of the blend: the median round's, and the best."""

    device: str
    base: str
    rank: int
    median: float
    best: float


def merge_times(
    load: Load, methods: Sequence[str], *, devices: tuple[Device, Device], copies: Sequence[float], rounds: int
) -> list[MergeTime]:
    """Some methods under one load; `copies` are both devices' copy bandwidths in GB/s."""
    groups = slot_groups(load.shapes, load.layers)
    adapters = [random_adapter(i, groups, rank=load.rank, bits=load.bits) for i in range(load.adapters)]
    weights = [1 / load.adapters] * load.adapters
    mergers, rows = [Merger(device) for device in devices], []
    for method in methods:
        settings = MergeSettings(method)
        size = stored_bytes(adapters) + mergers[0].merge(adapters, weights, settings).bytes
        ours, theirs = (
            time_rounds(functools.partial(merger.merge, adapters, weights, settings), rounds) for merger in mergers
        )
        rates = [size / timing.least / 1e6 for timing in (ours, theirs)]
        shares = [rate / copy for rate, copy in zip(rates, copies, strict=True)]
        rows.append(
            MergeTime(
                load,
                method,
                device=ours,
                reference=theirs,
                bytes_moved=size,
                gb_per_s=rates[0],
                of_copy=shares[0],
                reference_of_copy=shares[1],
            )
        )
    return rows


def capped_layers(shapes: str, layers: int | None) -> int:
    """The layers of some of SHAPES, at most `layers`."""
    return min(layers or SHAPES[shapes][0], SHAPES[shapes][0])


def embedder_graph(folder: Path, device: Device) -> Path | None:
    """The checked graph of a bundle's embedder; None if it runs elsewhere than on the device."""
    bundle = Bundle(folder)
    spec = bundle.manifest.embedder
    return bundle.path(spec.graph) if embedder_device(spec, device) == device else None


def compose_time(folder: Path, device: Device, *, prompt: str, rounds: int) -> ComposeTime:
    """A blend that is merged anew for each prompt, and one from the cache."""
    request, numbers = Request(retrieval=RetrievalSettings(nucleus=1.0, neighbours=100)), itertools.count()
    with Composer(Bundle(folder), device) as composer:
        composer.warm_up()
        decoder = composer.model.decoder
        capacity = min(256, composer.bundle.manifest.base.context)

        def bind(text: str) -> None:
            decoder.start(composer.compose(text, request).merged, capacity)

        new = time_rounds(lambda: bind(f"{prompt} {next(numbers)}"), rounds)
        return ComposeTime(device.kind, new, time_rounds(lambda: bind(prompt), rounds))


def decode_rates(base: Base, device: Device, rounds: int) -> list[DecodeRate]:
    """DecoderState under blends of random adapters of the ranks of BLENDS; the blends take turns."""
    decoder, merger, ids = Decoder(base.graphs[device.kind], base.spec, device), Merger(device), base.prompt()
    capacity = min(base.spec.context, len(ids) + 4 * TOKENS)
    steps = {}
    for rank, ranks in BLENDS.items():
        adapters = [gaussian_adapter(f"random{i}", base.spec.slots, rank=r, bits=4) for i, r in enumerate(ranks)]
        merged = merger.merge(adapters, [1 / max(1, len(ranks))] * len(ranks), MergeSettings("product"))
        steps[rank] = token_steps(decoder, merged, ids, capacity=capacity)
    times: dict[int, list[float]] = {rank: [] for rank in steps}
    for _ in range(rounds):
        for rank, step in steps.items():
            times[rank].append(time_rounds(step, TOKENS).median)
    return [
        DecodeRate(
            device.kind,
            base.name,
            rank=rank,
            median=1e3 / sorted(values)[len(values) // 2],
            best=1e3 / min(values),
        )
        for rank, values in times.items()
    ]
