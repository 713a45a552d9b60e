"""Parity of two devices: every merge method, and the decoder with blends of adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.merge import random_adapter, slot_groups
from edgecompose.bundle.adapter import Adapter, AdapterModule, load_adapter
from edgecompose.bundle.files import Bundle
from edgecompose.bundle.manifest import BaseSpec, SlotGroup
from edgecompose.bundle.quantization import Bits, quantize
from edgecompose.bundle.records import value_from_json
from edgecompose.engine.decoder import Decoder, decoder_graph
from edgecompose.engine.device import Device, host
from edgecompose.errors import BundleError
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import METHODS, MergeSettings
from edgecompose.merging.sparsify import thresholds
from edgecompose.retrieval.embedder import Embedder, embedder_device

Float = npt.NDArray[np.float32]
#: Devices of both kinds, to ask which graph they run.
_KINDS = (host(""), Device("cuda", (), ""))
Factors = Mapping[str, tuple[Float, Float]]
#: Kind of device -> the graph that it runs.
Graphs = Mapping[Literal["cpu", "cuda"], Path]
#: Largest difference over largest magnitude that sums of float32 in another order may give. Products that are rounded
#: to TF32 differ by about 1e-3, and fail.
TOLERANCE = 1e-5
#: Where Gram matrices in float32 are decomposed; with rounding noise of 1e-7 put into them on a CPU, core_ties moves by
#: up to 1e-2 (a vote in core space that cancels but for rounding goes either way), the others by up to 5e-5.
METHOD_TOLERANCE = {"svd": 2e-4, "core_prune": 2e-4, "core_dare": 2e-4, "core_ties": 5e-2}
#: Share of entries that may differ by any amount where signs are elected: votes that cancel but for rounding.
FLIPS = 1e-5
#: Of logits, by the precision of the base. CPU kernels for packed weights round activations to 8 bits, CUDA's do not:
#: that alone moves the logits of the demo base by up to 0.05.
LOGITS_TOLERANCE = {"fp32": 1e-3}
#: The same where the device's graph has attention in float16; on a CPU that moves the demo's logits by up to 2e-3 when
#: its packed weights compute in float32.
HALF_LOGITS_TOLERANCE = {"fp32": 5e-3, "fp16": 5e-3}
PACKED_LOGITS_TOLERANCE = 0.1
PROMPT = "Customer review of a business: We waited forty minutes, and the soup came cold. Positive or negative?"
#: Of vectors of unit norm, an encoder in float32 on both sides.
EMBEDDER_TOLERANCE = 1e-4
WEIGHTS = (0.7, -0.4, 1.3, 0.2)
#: Blocks of 32 values; a tall and a wide module; blocks of 8, 16 and 2 values.
_EVEN = (SlotGroup("q_proj", 3, 64, 96), SlotGroup("k_proj", 3, 96, 32), SlotGroup("down_proj", 3, 160, 64))
_UNEVEN = (SlotGroup("q_proj", 2, 24, 40), SlotGroup("v_proj", 2, 48, 6), SlotGroup("up_proj", 2, 40, 16))


class _Judged:
    """What was compared, with the error that was found and the one that is allowed."""

    __slots__ = ()
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether no case was beyond the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class MethodParity(_Judged):
    """The worst of all cases of a method; `error` is infinite, and `worst` says why, where it could not be run."""

    method: str
    cases: int
    error: float
    tolerance: float
    worst: str


@dataclass(frozen=True, slots=True)
class DecoderParity(_Judged):
    """Logits of a prompt and of some steps after it, on the same tokens.

    `equal` of `tokens` greedy choices agree; they may differ where two logits nearly tie, and are not judged.
    """

    base: str
    blend: str
    tokens: int
    equal: int
    error: float
    tolerance: float
    worst: str


@dataclass(frozen=True, slots=True)
class EmbedderParity(_Judged):
    """Vectors of some texts, by the encoder on the device and on the CPU; `error` is the largest difference."""

    embedder: str
    texts: int
    error: float
    tolerance: float
    worst: str


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A decoder to run, and at least three adapters for it. `graphs`: the one for each kind of device."""

    name: str
    graphs: Graphs
    tokenizer: Path
    spec: BaseSpec
    adapters: tuple[Adapter, ...]

    @classmethod
    def of_bundle(cls, folder: Path) -> Base:
        """The base of a bundle and its first adapters, random ones where it has fewer than three."""
        bundle = Bundle(folder)
        spec = bundle.manifest.base
        names = sorted(bundle.manifest.adapters)[:3]
        found = [load_adapter(bundle.adapter_file(name), name, spec.slots, spec.identity) for name in names]
        found += [gaussian_adapter(f"random{i}", spec.slots, 8, 4) for i in range(3 - len(found))]
        bundle.path(spec.graph)  # checks the data file that all graphs read
        graphs: Graphs = {device.kind: bundle.path(decoder_graph(spec, device)) for device in _KINDS}
        return cls(folder.name, graphs, bundle.path(spec.tokenizer), spec, tuple(found))

    @classmethod
    def of_folder(cls, folder: Path) -> Base:
        """An exported base with random adapters.

        Raises:
            BundleError: the folder holds none.
        """
        if not (folder / "base.json").is_file():
            raise BundleError(f"'{folder}' holds no base.json; make it with 'edgecompose-export base'")
        content = json.loads((folder / "base.json").read_text(encoding="utf-8"))
        spec = value_from_json(BaseSpec, content, "base.json")
        adapters = tuple(gaussian_adapter(f"random{i}", spec.slots, 8, 4) for i in range(3))
        graphs: Graphs = {device.kind: folder / decoder_graph(spec, device) for device in _KINDS}
        return cls(folder.name, graphs, folder / spec.tokenizer, spec, adapters)

    def prompt(self) -> list[int]:
        """Ids of PROMPT, at most half of the context."""
        return Tokenizer(self.tokenizer).encode_prompt(PROMPT)[: self.spec.context // 2]


def merge_parity(device: Device, reference: Device) -> Iterator[MethodParity]:
    """Every method of METHODS on both devices: rows resident on the one, gathered on the host for the other."""
    merger, wanted = Merger(device, resident=True), Merger(reference, resident=False)
    pools = adapter_pools()
    for method in METHODS:
        count, error, worst = 0, 0.0, ""
        for name, adapters, settings in cases(method, pools):
            weights = WEIGHTS[: len(adapters)]
            theirs = wanted.merge(adapters, weights, settings).factors()
            try:
                found = relative_error(merger.merge(adapters, weights, settings).factors(), theirs, settings)
            except Exception as failure:  # whatever a kernel or what follows on its result raises is a finding
                found, name = math.inf, f"{name}: {described(failure)}"
            count += 1
            if found > error:
                error, worst = found, name
        yield MethodParity(method, count, error, METHOD_TOLERANCE.get(method, TOLERANCE), worst)


def cases(
    method: str, pools: Mapping[str, tuple[Adapter, ...]]
) -> Iterator[tuple[str, tuple[Adapter, ...], MergeSettings]]:
    """The plain method on all pools of adapters that it takes, and each edge of its parameters on two of them."""
    row = METHODS[method]
    for name, adapters in pools.items():
        if row.ranks != "same" or name != "mixed ranks":
            yield name, adapters, MergeSettings(method)
    edges: dict[str, list[MergeSettings]] = {
        "density": [MergeSettings(method, density) for density in (0.1, 0.37, 1.0)],
        "majority_sign": [MergeSettings(method, density, "frequency") for density in (0.5, 1.0)],
        "seed": [MergeSettings(method, seed=7)],
        "rank": [MergeSettings(method, rank=rank) for rank in (1, 5, 1000)],
        "energy": [MergeSettings(method, energy=share) for share in (0.5, 0.95, 1.0)],
    }
    varied = [settings for name in row.parameters for settings in edges.get(name, [])]
    for settings in (*varied, MergeSettings(method, norm_guard=True)):
        shown = ", ".join(f"{k}={v}" for k, v in settings.parameters().items())
        for name in ("int4", "missing modules"):
            yield f"{name}; {shown}{'; norm guard' * settings.norm_guard}", pools[name], settings


def adapter_pools() -> dict[str, tuple[Adapter, ...]]:
    """Random adapters: shapes, ranks, bits, modules that some lack; all but 'mixed ranks' have one rank each."""
    lacking = [_EVEN[:2], _EVEN[1:], _EVEN]
    wide = slot_groups("smollm2-135m", 1)
    return {
        "int4": tuple(gaussian_adapter(f"a{i}", _EVEN, 8, 4) for i in range(3)),
        "int8": tuple(gaussian_adapter(f"b{i}", _EVEN, 8, 8) for i in range(3)),
        "int4 and int8": (gaussian_adapter("c0", _EVEN, 4, 4), gaussian_adapter("c1", _EVEN, 4, 8)),
        "short blocks": tuple(gaussian_adapter(f"d{i}", _UNEVEN, 4, 8 if i else 4) for i in range(3)),
        "rank 1": tuple(gaussian_adapter(f"e{i}", _EVEN, 1, 4) for i in range(4)),
        "one adapter": (gaussian_adapter("f0", _EVEN, 8, 4),),
        "missing modules": tuple(gaussian_adapter(f"g{i}", groups, 6, 8) for i, groups in enumerate(lacking)),
        "mixed ranks": tuple(gaussian_adapter(f"h{i}", _EVEN, rank, 4) for i, rank in enumerate((3, 8, 17))),
        "smollm2-135m": tuple(random_adapter(i, wide, 16, 4) for i in range(2)),
    }


def gaussian_adapter(name: str, groups: Sequence[SlotGroup], rank: int, bits: Bits) -> Adapter:
    """Gaussian factors, quantised; the layers are scaled differently. The name is the seed."""
    rng, modules = np.random.default_rng(list(name.encode())), {}
    for group in groups:
        a, b = (
            quantize((rng.standard_normal((group.layers, rank, width)) * 0.01).astype(np.float32), bits)
            for width in (group.n_in, group.n_out)
        )
        scaling, ranks = np.linspace(0.5, 2, group.layers, dtype=np.float32), np.full(group.layers, rank, np.int32)
        modules[group.name] = AdapterModule(a, b, scaling, ranks, np.stack([thresholds(a), thresholds(b)]))
    return Adapter(name, modules, bits, "", f"{name}-{rank}-{bits}")


def relative_error(found: Factors, wanted: Factors, settings: MergeSettings) -> float:
    """Largest difference over the largest magnitude of the same tensor; infinite where shapes or modules differ.

    Methods of the exact family are compared by the updates A^T B, whose factors are not unique; FLIPS of the entries
    are left out where a method elects signs.
    """
    if set(found) != set(wanted):
        return math.inf
    differences = []
    with np.errstate(all="ignore"):  # what is not finite is a difference without bound
        for module, factors in wanted.items():
            for ours, theirs in zip(*(_compared(f, settings) for f in (found[module], factors)), strict=True):
                if ours.shape != theirs.shape:
                    return math.inf
                largest = max(float(np.abs(theirs).max()), float(np.finfo(np.float32).tiny))
                differences.append(np.abs(ours - theirs).ravel() / largest)
    every = np.nan_to_num(np.concatenate(differences), nan=np.inf, posinf=np.inf)
    place = every.size - 1 - (int(FLIPS * every.size) if "majority_sign" in settings.row.parameters else 0)
    return float(np.partition(every, place)[place])


def _compared(factors: tuple[Float, Float], settings: MergeSettings) -> tuple[Float, ...]:
    a, b = factors
    return (np.matmul(a.transpose(0, 2, 1), b),) if settings.row.family == "exact" else (a, b)


def decoder_parity(base: Base, device: Device, reference: Device, steps: int = 8) -> Iterator[DecoderParity]:
    """The base alone, with one adapter and with three: a prompt at once, then steps of one token."""
    tolerances = LOGITS_TOLERANCE if base.graphs[device.kind] == base.graphs["cpu"] else HALF_LOGITS_TOLERANCE
    tolerance = tolerances.get(base.spec.precision, PACKED_LOGITS_TOLERANCE)
    for name, adapters in {"no adapter": (), "one adapter": base.adapters[:1], "three": base.adapters[:3]}.items():
        wanted, tokens = _logits(base, adapters, reference, steps, None)
        error, equal, worst = 0.0, 0, ""
        try:
            found, _ = _logits(base, adapters, device, steps, tokens)
        except Exception as failure:
            error, worst = math.inf, described(failure)
        else:
            for i, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
                step = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
                equal += int(ours.argmax() == theirs.argmax())
                if not step <= error:
                    error, worst = math.inf if math.isnan(step) else step, f"step {i}" if i else "prompt"
        yield DecoderParity(base.name, name, steps + 1, equal, error, tolerance, worst)


def _logits(
    base: Base, adapters: Sequence[Adapter], device: Device, steps: int, tokens: Sequence[int] | None
) -> tuple[list[Float], list[int]]:
    """Logits after the prompt and after each step, and the tokens that were fed: those given, or the greedy ones."""
    weights = [1 / max(1, len(adapters))] * len(adapters)
    merged = Merger(device).merge(adapters, weights, MergeSettings("product"))
    fed, found, chosen = base.prompt(), [], list[int]()
    decoding = Decoder(base.graphs[device.kind], base.spec, device).start(merged, len(fed) + steps)
    for step in range(steps + 1):
        found.append(decoding.forward(fed)[0].copy())
        chosen.append(int(found[-1].argmax()) if tokens is None else tokens[step])
        fed = [chosen[-1]]
    return found, chosen


def embedder_parity(folder: Path, device: Device, reference: Device) -> Iterator[EmbedderParity]:
    """The encoder of a bundle, where it runs on the device: short texts, long ones, and one beyond its window."""
    bundle = Bundle(folder)
    spec = bundle.manifest.embedder
    if embedder_device(spec, device) != device:
        return
    texts = ("yes", PROMPT, f"{PROMPT} " * 4, f"{PROMPT} " * 100)
    graph, tokenizer = bundle.path(spec.graph), bundle.path(spec.tokenizer)
    theirs = Embedder(graph, tokenizer, spec, reference)
    error, worst = 0.0, ""
    try:
        ours = Embedder(graph, tokenizer, spec, device)
        for text in texts:
            found = float(np.abs(ours.embed(text) - theirs.embed(text)).max())
            if found > error:
                error, worst = found, f"{len(text)} characters"
    except Exception as failure:
        error, worst = math.inf, described(failure)
    yield EmbedderParity(folder.name, len(texts), error, EMBEDDER_TOLERANCE, worst)


def described(failure: Exception) -> str:
    """What was raised, in one line."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:240]}"
