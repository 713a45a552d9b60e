"""Blends quantised adapters into the tensors that a decoder is bound to; knows nothing of prompts or files.

The arithmetic runs in ONNX Runtime on the chosen device, from the quantised arrays, module by module, in few large
operations. What does not depend on the weights is kept: trimmed codes, and the small matrices of the exact methods.
docs/concepts/merging.md says what each method computes and when to use it.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgecompose import core_space, trimming
from edgecompose.adapter import Adapter, AdapterModule
from edgecompose.blend import SIDES, MergedAdapter, MergedModule, MergeReport, Side
from edgecompose.buffers import BufferPool, LruCache
from edgecompose.device import Device, OrtValue, Session, View, bind, open_session, usable_cores
from edgecompose.errors import MergeError
from edgecompose.methods import MergeSettings, composition_digest
from edgecompose.rows import HostRows, Part, ResidentRows, Rows

Double = npt.NDArray[np.float64]
T = TypeVar("T")
U = TypeVar("U")
_LARGEST_WEIGHT = 1e6
#: Values that one run of a graph handles: what it works on should stay in a CPU's last cache.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 25}
#: Slots begin at multiples of this many values (64 bytes).
_ALIGNMENT = 16
#: What is kept of prompts before: trimmed codes, and Gram matrices and bases of sets of adapters.
_TRIMMED_BYTES, _SPACES_BYTES = 256 << 20, 256 << 20
Parts = dict[str, list[Part]]
Grams = tuple[Double, Double]


class Merger:
    """Runs the merge graphs on one device, each session opened once. Safe between threads.

    Args:
        resident: keep the packed codes of adapters on the device; None does so on CUDA.
    """

    def __init__(self, device: Device, *, resident: bool | None = None) -> None:
        self._device = device
        self._session = functools.lru_cache(maxsize=None)(self._open)
        self._pool = BufferPool(device)
        self._trimmed: LruCache[AdapterModule] = LruCache(_TRIMMED_BYTES, lambda m: m.a.codes.nbytes + m.b.codes.nbytes)
        self._grams: LruCache[Grams] = LruCache(_SPACES_BYTES, lambda pair: pair[0].nbytes + pair[1].nbytes)
        self._spaces: LruCache[core_space.CoreSpace] = LruCache(_SPACES_BYTES, lambda space: space.nbytes)
        self._host = HostRows()
        wanted = device.kind == "cuda" if resident is None else resident
        self._resident = ResidentRows(device, self._copy) if wanted else None
        workers = usable_cores() if device.kind == "cpu" else 1
        self._threads = ThreadPoolExecutor(workers, "merge") if workers > 1 else None

    def merge(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        settings: MergeSettings,
        inner: Double | None = None,
    ) -> MergedAdapter:
        """Blend adapters.

        Args:
            adapters: any number; none gives the base alone.
            weights: one for each, dimensionless, finite, used as given (not renormalised).
            inner: (K, K) inner products of the updates, as `inner_products` gives them, if they are known; the norm
                guard computes them otherwise.

        Raises:
            MergeError: unequal numbers, a weight that is not finite, ranks that differ under a method that
                needs one rank, or a density that keeps no entry.
        """
        _check(adapters, weights, settings)
        if len(adapters) == 1 and settings.row.trims:  # PEFT does so: one adapter is neither pruned nor voted on
            settings = replace(settings, method="linear" if settings.row.family == "paper" else "product")
        digest = composition_digest({a.name: a.digest for a in adapters}, dict(_named(adapters, weights)), settings)
        modules = sorted({m for a in adapters for m in a.modules})
        if not modules:
            return MergedAdapter({}, digest)
        if not settings.norm_guard:
            return self._merge(adapters, weights, modules, settings, digest, 1.0)
        inner = self.inner_products(adapters) if inner is None else inner
        given = np.array(weights, np.float64)
        wanted = float(np.abs(given) @ np.sqrt(np.maximum(np.diag(inner), 0)))
        if settings.row.name in ("product", "cat"):
            found = math.sqrt(max(float(given @ inner @ given), 0.0))
        else:
            found = self.norm(self._merge(adapters, weights, modules, settings, digest, 1.0))
        factor = wanted / found if found > 1e-6 * wanted else 1.0  # updates that cancel are not blown up
        # every method is homogeneous in the weights, so the factor goes there
        return self._merge(adapters, (factor * given).tolist(), modules, settings, digest, factor)

    def inner_products(self, adapters: Sequence[Adapter]) -> Double:
        """<ΔW_i, ΔW_j> of every pair, summed over modules and layers: (K, K), computed from factors."""
        total = np.zeros((len(adapters), len(adapters)))
        for module in sorted({m for a in adapters for m in a.modules}):
            present = [i for i, a in enumerate(adapters) if module in a.modules]
            parts = [_exact_part(adapters[i], module, 1.0) for i in present]
            grams = self._gram_matrices({module: parts})[module]
            total[np.ix_(present, present)] += core_space.inner_products(*grams, _ranks(parts))
        return total

    def norm(self, merged: MergedAdapter) -> float:
        """Frobenius norm of the whole update of a blend."""
        total = 0.0
        for name, module in merged.modules.items():
            norms = self._device.empty((module.layers,))
            views = {
                side.lower(): View(merged.buffer, merged.address(name, side, 0)[0], module.place(side)[1])
                for side in SIDES
            }
            self._run("norm", views, norms.data_ptr(), (module.layers,))
            total += float(norms.numpy().sum())
        return math.sqrt(max(total, 0.0))

    def _merge(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        modules: Sequence[str],
        settings: MergeSettings,
        digest: str,
        norm_factor: float,
    ) -> MergedAdapter:
        chosen = list(zip(adapters, weights, strict=True))
        if settings.row.family == "paper" and settings.row.ranks == "same":
            found = self._map(lambda module: self._paper_parts(module, chosen, settings), modules)
            parts = dict(zip(modules, found, strict=True))
            merged = self._allocate(parts, {m: p[0].a.rank for m, p in parts.items()}, digest, MergeReport(norm_factor))
            kind = settings.method.removeprefix("dare_")
            graph = f"ties_{settings.majority_sign}" if kind == "ties" else "linear"
            chunks = self._chunks(parts, even_weights=True)
            self._map(lambda item: self._combine(graph, merged, parts, *item), chunks)
        elif settings.method in ("product", "cat"):
            parts = {m: [_exact_part(a, m, w) for a, w in chosen if m in a.modules] for m in modules}
            ranks = {m: sum(_ranks(p)) for m, p in parts.items()}
            merged = self._allocate(parts, ranks, digest, MergeReport(norm_factor))
            self._map(lambda item: self._stack(merged, parts, *item), self._chunks(parts))
        else:
            merged = self._merge_core(chosen, modules, settings, digest, norm_factor)
        return merged

    def _merge_core(
        self,
        chosen: Sequence[tuple[Adapter, float]],
        modules: Sequence[str],
        settings: MergeSettings,
        digest: str,
        norm_factor: float,
    ) -> MergedAdapter:
        """The svd and the methods in core space: Gram matrices, small matrices from them, and mixtures of the rows."""
        members = {m: [(a, w) for a, w in chosen if m in a.modules] for m in modules}
        parts = {m: [_exact_part(a, m, 1.0) for a, _ in found] for m, found in members.items()}
        solve = self._truncated if settings.method == "svd" else self._in_core_space
        mixes = solve(members, parts, settings)
        total = sum(float(mix.energy.sum()) for mix in mixes.values())
        kept = sum(float(mix.kept_energy.sum()) for mix in mixes.values())
        report = MergeReport(norm_factor, max(0.0, 1 - kept / total) if total else 0.0)
        if settings.method == "svd":
            parts = {m: [_exact_part(a, m, w) for a, w in found] for m, found in members.items()}
        ranks = {m: sum(_ranks(parts[m])) if mix.b is None else mix.b.shape[1] for m, mix in mixes.items()}
        merged = self._allocate(parts, ranks, digest, report)
        self._map(lambda item: self._mix(merged, parts, mixes, *item), self._chunks(parts))
        return merged

    def _truncated(
        self, members: Mapping[str, Sequence[tuple[Adapter, float]]], parts: Parts, settings: MergeSettings
    ) -> dict[str, core_space.Mixes]:
        """The mixtures of svd, for rows of A with their weights."""
        mixes = {}
        for module, (gram_a, gram_b) in self._gram_matrices(parts).items():
            ranks = _ranks(parts[module])
            cap = max(ranks) if settings.rank is None and settings.energy is None else settings.rank
            row_weights = np.repeat([w for _, w in members[module]], ranks)
            weighted = gram_a * np.outer(row_weights, row_weights)
            mixes[module] = core_space.truncate(weighted, gram_b, cap, settings.energy)
        return mixes

    def _in_core_space(
        self, members: Mapping[str, Sequence[tuple[Adapter, float]]], parts: Parts, settings: MergeSettings
    ) -> dict[str, core_space.Mixes]:
        """The mixtures of the core methods; what the weights do not enter is kept for the next blend of the set."""
        keys = {m: f"{_set_of(p)}|{settings.row.trims}|{settings.density}|{settings.seed}" for m, p in parts.items()}
        spaces = {module: self._spaces.get(key) for module, key in keys.items()}
        missing = {module: parts[module] for module, space in spaces.items() if space is None}
        grams = self._gram_matrices(missing)
        combine = core_space.disjoint_mean if settings.method == "core_ties" else core_space.weighted_sum
        mixes = {}
        for module, space in spaces.items():
            if space is None:
                space = _trimmed_space(module, members[module], grams[module], _ranks(parts[module]), settings)
                self._spaces.put(keys[module], space)
            core = combine(space.cores, np.array([w for _, w in members[module]], np.float64))
            whole = np.ones(len(core))
            mixes[module] = core_space.Mixes(None, space.between(core), whole, whole)
        return mixes

    def _gram_matrices(self, parts: Parts) -> dict[str, Grams]:
        """Inner products of the stacked rows of each module, A A^T and B B^T: (L, R, R), scales in A, no weights."""
        known = {module: self._grams.get(_set_of(members)) for module, members in parts.items()}
        missing = {module: parts[module] for module, grams in known.items() if grams is None}
        found: dict[tuple[str, Side], npt.NDArray[np.float32]] = {}
        for module, members in missing.items():
            layers, rank = len(members[0].weight_a), sum(_ranks(members))
            for side in SIDES:
                found[module, side] = np.empty((layers, rank, rank), np.float32)

        def fill(item: tuple[str, Side, slice]) -> None:
            module, side, layers = item
            rows = self._gather(parts[module], side, layers, stacked=True)
            count, rank = found[module, side][layers].shape[:2]
            out = self._device.empty((count, rank, rank))
            shape = np.array([count, rank, parts[module][0].side(side)[0].width], np.int64)
            self._run(f"{rows.graph}gram", {**rows.feeds, "shape": shape}, out.data_ptr(), (count, rank, rank))
            found[module, side][layers] = out.numpy()

        self._map(fill, self._chunks(missing))
        for module, members in missing.items():
            grams = found[module, "A"].astype(np.float64), found[module, "B"].astype(np.float64)
            self._grams.put(_set_of(members), grams)
            known[module] = grams
        return {module: grams for module, grams in known.items() if grams is not None}

    def _paper_parts(self, module: str, chosen: Sequence[tuple[Adapter, float]], settings: MergeSettings) -> list[Part]:
        """Factors trimmed as the method wants them, and PEFT's weights: sqrt(|w s|) on both, the sign on A."""
        members = [(a, w) for a, w in chosen if module in a.modules]
        if len(members) > 1:
            _check_common_rank(module, [a.modules[module] for a, _ in members])
        rescale = 1 / settings.density if settings.row.trims == "drop" else 1.0
        parts = []
        for adapter, weight in members:
            key, trimmed = self._trim(adapter, module, settings)
            scale = np.float32(weight) * trimmed.scaling
            root = (np.sqrt(np.abs(scale)) * np.float32(rescale)).astype(np.float32)
            parts.append(Part(key, trimmed.a, trimmed.b, np.where(scale < 0, -root, root), root))
        return parts

    def _trim(self, adapter: Adapter, module: str, settings: MergeSettings) -> tuple[str, AdapterModule]:
        """A module without the entries that the method drops, and the name of its content."""
        found, key = adapter.modules[module], f"{adapter.digest}/{module}"
        kind = settings.row.trims
        if kind is None or settings.density == 1:
            return key, found
        key = f"{key}/{kind}/{settings.density}/{settings.seed if kind == 'drop' else ''}"
        trimmed = self._trimmed.get(key)
        if trimmed is None:
            if kind == "prune":
                a, b = (
                    trimming.prune(f, settings.density, t)
                    for f, t in zip((found.a, found.b), found.thresholds, strict=True)
                )
            else:
                a, b = (
                    trimming.drop(f, settings.density, f"{key}/{side}") for f, side in ((found.a, "A"), (found.b, "B"))
                )
            trimmed = replace(found, a=a, b=b)
            self._trimmed.put(key, trimmed)
        return key, trimmed

    def _allocate(self, parts: Parts, ranks: Mapping[str, int], digest: str, report: MergeReport) -> MergedAdapter:
        """A blend to be filled; its buffer goes back to the pool with it, so it is the buffer's only owner."""
        modules, end = {}, 0
        for name, members in parts.items():
            layers, n_in, n_out = len(members[0].weight_a), members[0].a.width, members[0].b.width
            start_b = end + _aligned(layers * ranks[name] * n_in)
            modules[name] = MergedModule(layers, ranks[name], n_in, n_out, end, start_b)
            end = start_b + _aligned(layers * ranks[name] * n_out)
        buffer = self._pool.take(end)
        merged = MergedAdapter(modules, digest, buffer, report)
        weakref.finalize(merged, self._pool.give, buffer).atexit = False
        return merged

    def _stack(self, merged: MergedAdapter, parts: Parts, module: str, side: Side, layers: slice) -> None:
        rows = self._gather(parts[module], side, layers, stacked=True)
        self._run(f"{rows.graph}stack", rows.feeds, merged.address(module, side, layers.start)[0], rows.shape)

    def _combine(self, graph: str, merged: MergedAdapter, parts: Parts, module: str, side: Side, layers: slice) -> None:
        rows = self._gather(parts[module], side, layers, stacked=False)
        weights = np.array([[part.side(side)[1][layers.start] for part in parts[module]]], np.float32)
        feeds = {**rows.feeds, "weights": weights}
        if graph != "linear":
            feeds["ones"] = np.ones_like(weights)
        address, (rank, width) = merged.address(module, side, layers.start)
        self._run(f"{rows.graph}{graph}", feeds, address, (1, (layers.stop - layers.start) * rank * width))

    def _mix(
        self, merged: MergedAdapter, parts: Parts, mixes: Mapping[str, core_space.Mixes], module: str, side: Side,
        layers: slice,
    ) -> None:  # fmt: skip
        mix = mixes[module].a if side == "A" else mixes[module].b
        if mix is None:
            self._stack(merged, parts, module, side, layers)
            return
        rows = self._gather(parts[module], side, layers, stacked=True)
        address, (rank, width) = merged.address(module, side, layers.start)
        count = layers.stop - layers.start
        shape = np.array([count, mix.shape[2], width], np.int64)
        feeds = {**rows.feeds, "mix": mix[layers].astype(np.float32), "shape": shape}
        self._run(f"{rows.graph}mix", feeds, address, (count, rank, width))

    def _gather(self, parts: Sequence[Part], side: Side, layers: slice, *, stacked: bool) -> Rows:
        if self._resident is not None and self._resident.takes(parts, side):
            return self._resident.gather(parts, side, layers, stacked=stacked)
        return self._host.gather(parts, side, layers, stacked=stacked)

    def _copy(self, given: OrtValue, address: int) -> None:
        """Copy a (N, n) array of bytes or values to an address of the device."""
        codes = "uint8" in given.data_type()
        view = View(given, given.data_ptr(), tuple(given.shape()), np.uint8 if codes else np.float32)
        self._run("copy_codes" if codes else "copy_values", {"given": view}, address, view.shape, view.dtype)

    def _run(
        self,
        graph: str,
        feeds: Mapping[str, npt.NDArray[Any] | View],
        address: int,
        shape: Sequence[int],
        dtype: type[np.generic] = np.float32,
    ) -> None:
        """Run a graph on arrays of the host and on views of the device's memory; write its result to `address`."""
        session, kind = self._session(graph), self._device.kind
        binding = session.io_binding()
        alive = [bind(binding, self._device, name, value) for name, value in feeds.items()]
        binding.bind_output("merged", kind, 0, dtype, list(shape), address)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        del alive

    def _chunks(self, parts: Parts, *, even_weights: bool = False) -> Iterator[tuple[str, Side, slice]]:
        return _layer_chunks(parts, _CHUNK[self._device.kind], even_weights=even_weights)

    def _map(self, function: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """Apply a function to all items, on the cores where the device is a CPU."""
        return list(map(function, items) if self._threads is None else self._threads.map(function, items))

    def _open(self, graph: str) -> Session:
        content = (resources.files("edgecompose") / "graphs" / f"{graph}.onnx").read_bytes()
        threads = 1 if self._device.kind == "cpu" else None
        return open_session(content, self._device, name=f"merge {graph}", threads=threads)


def _trimmed_space(
    module: str,
    members: Sequence[tuple[Adapter, float]],
    grams: Grams,
    ranks: tuple[int, ...],
    settings: MergeSettings,
) -> core_space.CoreSpace:
    """Shared bases, and the updates in them with the entries dropped that the method drops."""
    space = core_space.core_space(*grams, ranks)
    cores = space.cores
    if settings.method == "core_dare":
        kept = np.stack([
            trimming.random_mask(cores.shape[1:], settings.density, f"{adapter.digest}/{module}/{settings.seed}")
            for adapter, _ in members
        ])  # fmt: skip
        return replace(space, cores=cores * kept / settings.density)
    return replace(space, cores=core_space.prune(cores, trimming.kept_entries(settings.density, cores[0, 0].size)))


def _set_of(parts: Sequence[Part]) -> str:
    """Names the factors of a module in some adapters, in their order."""
    return "|".join(part.key for part in parts)


def _exact_part(adapter: Adapter, name: str, weight: float) -> Part:
    """Weight and scale on A, as PEFT's 'cat' has them."""
    module = adapter.modules[name]
    scale = (np.float32(weight) * module.scaling).astype(np.float32)
    return Part(f"{adapter.digest}/{name}", module.a, module.b, scale, np.ones_like(scale))


def _ranks(parts: Sequence[Part]) -> tuple[int, ...]:
    return tuple(part.a.rank for part in parts)


def _aligned(values: int) -> int:
    return -(-values // _ALIGNMENT) * _ALIGNMENT


def _layer_chunks(parts: Parts, values: int, *, even_weights: bool) -> Iterator[tuple[str, Side, slice]]:
    """Runs of layers whose rows together have about so many values, and one weight per adapter where wanted."""
    for module, members in parts.items():
        for side in SIDES:
            sides = [p.side(side) for p in members]
            weights = np.stack([weight for _, weight in sides])
            a_layer = sum(factor.rank * factor.width for factor, _ in sides)
            most, layers = max(1, values // a_layer), weights.shape[1]
            start = 0
            for stop in range(1, layers + 1):
                uneven = even_weights and stop < layers and bool((weights[:, stop] != weights[:, start]).any())
                if stop == layers or stop - start == most or uneven:
                    yield module, side, slice(start, stop)
                    start = stop


def _named(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[tuple[str, float]]:
    return [(a.name, float(w)) for a, w in zip(adapters, weights, strict=True)]


def _check(adapters: Sequence[Adapter], weights: Sequence[float], settings: MergeSettings) -> None:
    if len(adapters) != len(weights):
        raise MergeError(f"{len(adapters)} adapters came with {len(weights)} weights; one for each is wanted")
    bad = [f"{a.name}={w}" for a, w in zip(adapters, weights, strict=True) if not abs(w) <= _LARGEST_WEIGHT]
    if bad:
        raise MergeError(f"weights that are not finite, or beyond {_LARGEST_WEIGHT:g}: {', '.join(bad)}")
    names = [a.name for a in adapters]
    if len(set(names)) != len(names):
        raise MergeError(f"an adapter is named twice in {', '.join(names)}; add its weights up instead")


def _check_common_rank(module: str, parts: Sequence[AdapterModule]) -> None:
    """The factor-wise methods need one rank of a module in all adapters and layers."""
    ranks = {int(r) for m in parts for r, s in zip(m.ranks, m.scaling, strict=True) if s != 0}
    ranks |= {m.rank for m in parts}
    if len(ranks) != 1:
        raise MergeError(
            f"module '{module}' has ranks {sorted(ranks)}; factor-wise methods need one rank, use method product or cat"
        )
