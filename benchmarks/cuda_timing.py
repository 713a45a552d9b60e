"""Times of two devices: merging at the shapes of real models, composing, and decoding under blends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cuda_graphs import Timing, time_rounds
from benchmarks.cuda_parity import Base, gaussian_adapter
from benchmarks.merge import SHAPES, random_adapter, slot_groups, stored_bytes
from edgecompose.bundle.adapter import Adapter
from edgecompose.bundle.files import Bundle
from edgecompose.bundle.quantization import Bits
from edgecompose.composer import Composer
from edgecompose.engine.decoder import Decoder
from edgecompose.engine.device import Device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import MergeSettings
from edgecompose.request import Request
from edgecompose.retrieval.embedder import embedder_device

#: What is aimed at on CUDA: a prompt to a bound adapter, and merging at 8B shapes as a share of the copy bandwidth.
COMPOSE_TARGET_MS = 1.5
MERGE_TARGET, MERGE_TARGET_SHAPES = 0.6, "llama-8b"
#: Ranks of the blends under which decoding is timed, as the ranks of the adapters that make them up.
BLENDS = {0: (), 16: (16,), 48: (16, 16, 16)}
TOKENS = 32


@dataclass(frozen=True, slots=True)
class Load:
    """The adapters that are merged."""

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
        """The share of the copy bandwidth that is aimed at, where there is one."""
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
    load: Load, methods: Sequence[str], device: Device, reference: Device, copies: Sequence[float], rounds: int
) -> list[MergeTime]:
    """Some methods under one load; `copies` are both devices' copy bandwidths in GB/s."""
    groups = slot_groups(load.shapes, load.layers)
    adapters = [random_adapter(i, groups, load.rank, load.bits) for i in range(load.adapters)]
    weights = [1 / load.adapters] * load.adapters
    mergers, found = (Merger(device), Merger(reference)), []
    for method in methods:
        settings = MergeSettings(method)
        moved = stored_bytes(adapters) + mergers[0].merge(adapters, weights, settings).bytes
        ours, theirs = (_merge_time(merger, adapters, weights, settings, rounds) for merger in mergers)
        rates = [moved / timing.least / 1e6 for timing in (ours, theirs)]
        shares = [rate / copy for rate, copy in zip(rates, copies, strict=True)]
        found.append(MergeTime(load, method, ours, theirs, moved, rates[0], *shares))
    return found


def _merge_time(
    merger: Merger, adapters: Sequence[Adapter], weights: Sequence[float], settings: MergeSettings, rounds: int
) -> Timing:
    return time_rounds(lambda: merger.merge(adapters, weights, settings), rounds)


def loads(names: Sequence[str], layers: int | None, adapters: int, rank: int, bits: Bits) -> Iterator[Load]:
    """A load for each of some SHAPES, with at most `layers` layers."""
    for name in names:
        yield Load(name, min(layers or SHAPES[name][0], SHAPES[name][0]), adapters, rank, bits)


def embedder_graph(folder: Path, device: Device) -> Path | None:
    """The checked graph of a bundle's embedder, None where it runs elsewhere than on the device."""
    bundle = Bundle(folder)
    spec = bundle.manifest.embedder
    return bundle.path(spec.graph) if embedder_device(spec, device) == device else None


def compose_time(folder: Path, device: Device, prompt: str, rounds: int) -> ComposeTime:
    """A blend that is merged anew for each prompt, and one that the cache holds."""
    request, numbers = Request(nucleus=1.0, neighbours=100), itertools.count()
    with Composer(Bundle(folder), device) as composer:
        composer.warm_up()

        def new() -> None:
            bind(f"{prompt} {next(numbers)}")

        def bind(text: str) -> None:
            composer.model.decoder.start(
                composer.compose(text, request).merged, min(256, composer.model.decoder.spec.context)
            )

        return ComposeTime(device.kind, time_rounds(new, rounds), time_rounds(lambda: bind(prompt), rounds))


def decode_rates(base: Base, device: Device, rounds: int) -> list[DecodeRate]:
    """Decoding under blends of random adapters of the ranks of BLENDS; the blends take turns."""
    decoder, merger, ids = Decoder(base.graphs[device.kind], base.spec, device), Merger(device), base.prompt()
    capacity = min(base.spec.context, len(ids) + 4 * TOKENS)
    steps = {}
    for rank, ranks in BLENDS.items():
        adapters = [gaussian_adapter(f"random{i}", base.spec.slots, r, 4) for i, r in enumerate(ranks)]
        merged = merger.merge(adapters, [1 / max(1, len(ranks))] * len(ranks), MergeSettings("product"))
        steps[rank] = _Steps(decoder, merged, ids, capacity)
    spent: dict[int, list[float]] = {rank: [] for rank in steps}
    for _ in range(rounds):
        for rank, step in steps.items():
            spent[rank].append(time_rounds(step, TOKENS).median)
    return [
        DecodeRate(device.kind, base.name, rank, 1e3 / sorted(times)[len(times) // 2], 1e3 / min(times))
        for rank, times in spent.items()
    ]


class _Steps:
    """Greedy decoding, one token a call; begins again after the prompt when the sequence is full."""

    def __init__(self, decoder: Decoder, merged: MergedAdapter, ids: list[int], capacity: int) -> None:
        self._decoding, self._prompt, self._capacity = decoder.start(merged, capacity), len(ids), capacity
        self._token = int(self._decoding.forward(ids)[0].argmax())

    def __call__(self) -> None:
        if self._decoding.length == self._capacity:
            self._decoding.rewind(self._prompt)
        self._token = int(self._decoding.forward([self._token])[0].argmax())
