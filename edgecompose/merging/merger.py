"""Blends quantised adapters into the tensors that a decoder is bound to.

The arithmetic runs in ONNX Runtime on the chosen device, from the quantised arrays, module by module, in few large
operations. Results that do not depend on weights are cached: sparse codes, and the small matrices of the exact methods.
docs/concepts/merging.md says what each method computes and when to use it.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.adapter import Adapter, AdapterModule
from edgecompose.caching import LruCache
from edgecompose.engine.device import Device, View
from edgecompose.engine.memory import BufferPool, aligned
from edgecompose.engine.merged import SIDES, MergedAdapter, MergedModule, MergeReport, Side
from edgecompose.errors import MergeError
from edgecompose.guard.native import native
from edgecompose.merging import core_space
from edgecompose.merging.gather import HostRows, Part, Parts, ResidentRows, Rows, layer_chunks, ranks_of
from edgecompose.merging.methods import check_weights, composition_digest, effective, method_of
from edgecompose.merging.recombination import Recombiner
from edgecompose.merging.runner import GraphRunner
from edgecompose.settings import MergeSettings

Double = npt.NDArray[np.float64]
#: Rows mixed by larger numbers could leave float32, whatever an adapter's file may hold.
_LARGEST_MIXTURE = 1e15
#: Adapters that a message names.
_NAMED = 8
#: Values, signed values, those that agree, and which do.
_COPIES_OF_A_VOTE = 4
#: Sparse codes that are kept for the next blend with the same adapter.
_SPARSE_BYTES = 128 << 20


class Merger:
    """Runs the merge graphs on one device, each session opened once. Safe between threads.

    Args:
        resident: keep the packed codes of adapters on the device; None does so on CUDA.
    """

    def __init__(self, device: Device, *, resident: bool | None = None) -> None:
        self._device = device
        self._runner = GraphRunner(device)
        self._pool = BufferPool(device)
        self._sparsified: LruCache[AdapterModule] = LruCache(
            _SPARSE_BYTES, lambda m: m.a.codes.nbytes + m.b.codes.nbytes
        )
        self._host = HostRows()
        on_device = device.kind == "cuda" if resident is None else resident
        self._resident = ResidentRows(device, self._runner.copy) if on_device else None
        self._recombiner = Recombiner(self._runner, functools.partial(self._gather, stacked=True))

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
                needs one rank, a density that keeps no entry, or numbers that no merge can be computed from.
        """
        _check(adapters, weights, settings)
        names = ", ".join(adapter.name for adapter in adapters[:_NAMED])
        advice = "use other weights or another method, or export the adapters again"
        with native(MergeError, f"adapters {names} cannot be merged by {settings.method}", advice):
            return self._blend(adapters, weights, settings, inner)

    def _blend(
        self, adapters: Sequence[Adapter], weights: Sequence[float], settings: MergeSettings, inner: Double | None
    ) -> MergedAdapter:
        settings = effective(settings, len(adapters))
        digest = composition_digest({a.name: a.digest for a in adapters}, dict(_named(adapters, weights)), settings)
        modules = sorted({m for a in adapters for m in a.modules})
        if not modules:
            return MergedAdapter({}, digest)
        if not settings.norm_guard:
            return self._merge(adapters, weights, modules, settings, digest, 1.0)
        inner = self.inner_products(adapters) if inner is None else inner
        vector = np.array(weights, np.float64)
        target = float(np.abs(vector) @ np.sqrt(np.maximum(np.diag(inner), 0)))
        if method_of(settings).gram_norm:
            norm = math.sqrt(max(float(vector @ inner @ vector), 0.0))
        else:
            norm = self.norm(self._merge(adapters, weights, modules, settings, digest, 1.0))
        if not math.isfinite(target + norm):
            raise ValueError("the norm of the blend is not finite")
        factor = target / norm if norm > 1e-6 * target else 1.0  # updates that cancel are not blown up
        # every method is homogeneous in the weights, so the factor goes there
        return self._merge(adapters, (factor * vector).tolist(), modules, settings, digest, factor)

    def inner_products(self, adapters: Sequence[Adapter]) -> Double:
        """<ΔW_i, ΔW_j> of every pair, summed over modules and layers: (K, K), computed from factors."""
        names = ", ".join(adapter.name for adapter in adapters[:_NAMED])
        with native(MergeError, f"inner products of adapters {names} cannot be computed", "export the adapters again"):
            return self._inner_products(adapters)

    def _inner_products(self, adapters: Sequence[Adapter]) -> Double:
        total = np.zeros((len(adapters), len(adapters)))
        for module in sorted({m for a in adapters for m in a.modules}):
            present = [i for i, a in enumerate(adapters) if module in a.modules]
            parts = [_exact_part(adapters[i], module, 1.0) for i in present]
            grams = self._recombiner.gram_matrices({module: parts})[module]
            total[np.ix_(present, present)] += core_space.inner_products(*grams, ranks_of(parts))
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
            self._runner.run("norm", views, norms.data_ptr(), (module.layers,))
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
        chosen, report = list(zip(adapters, weights, strict=True)), MergeReport(norm_factor)
        plan = method_of(settings).plan
        if plan == "entrywise":
            return self._merge_entrywise(chosen, modules, settings, digest, report)
        if plan == "stack":
            return self._merge_stacked(chosen, modules, digest, report)
        return self._merge_recombined(chosen, modules, settings, digest, report)

    def _merge_stacked(
        self, chosen: Sequence[tuple[Adapter, float]], modules: Sequence[str], digest: str, report: MergeReport
    ) -> MergedAdapter:
        """Rows of all adapters one after another."""
        parts = {m: [_exact_part(a, m, w) for a, w in chosen if m in a.modules] for m in modules}
        merged = self._allocate(parts, {m: sum(ranks_of(p)) for m, p in parts.items()}, digest, report)
        self._runner.map(lambda item: self._stack(merged, parts, *item), layer_chunks(parts, self._device))
        return merged

    def _merge_entrywise(
        self,
        chosen: Sequence[tuple[Adapter, float]],
        modules: Sequence[str],
        settings: MergeSettings,
        digest: str,
        report: MergeReport,
    ) -> MergedAdapter:
        """Rows of one rank, combined entry by entry."""
        method = method_of(settings)
        assert method.graph is not None
        graph = method.graph(settings)
        members = self._runner.map(lambda module: self._factor_parts(module, chosen, settings), modules)
        parts = dict(zip(modules, members, strict=True))
        merged = self._allocate(parts, {m: p[0].a.rank for m, p in parts.items()}, digest, report)
        copies = 1 if graph == "linear" else _COPIES_OF_A_VOTE
        chunks = layer_chunks(parts, self._device, even_weights=True, copies=copies)
        self._runner.map(lambda item: self._combine(graph, merged, parts, *item), chunks)
        return merged

    def _merge_recombined(
        self,
        chosen: Sequence[tuple[Adapter, float]],
        modules: Sequence[str],
        settings: MergeSettings,
        digest: str,
        report: MergeReport,
    ) -> MergedAdapter:
        """Stacked rows, recombined by small matrices that come from their Gram matrices."""
        members = {m: [(a, w) for a, w in chosen if m in a.modules] for m in modules}
        parts = {m: [_exact_part(a, m, 1.0) for a, _ in pairs] for m, pairs in members.items()}
        recombined = self._recombiner.recombine(members, parts, settings)
        for matrix in (m for one in recombined.values() for m in (one.a, one.b) if m is not None):
            if not np.abs(matrix).max(initial=0) <= _LARGEST_MIXTURE:  # NaN is not
                raise ValueError("the blend is not finite")
        total = sum(float(one.energy.sum()) for one in recombined.values())
        energy = sum(float(one.kept_energy.sum()) for one in recombined.values())
        report = replace(report, discarded_energy=max(0.0, 1 - energy / total) if total else 0.0)
        if method_of(settings).plan == "truncate":
            parts = {m: [_exact_part(a, m, w) for a, w in pairs] for m, pairs in members.items()}
        ranks = {m: sum(ranks_of(parts[m])) if one.b is None else one.b.shape[1] for m, one in recombined.items()}
        merged = self._allocate(parts, ranks, digest, report)
        chunks = layer_chunks(parts, self._device)
        self._runner.map(lambda item: self._recombine(merged, parts, recombined, *item), chunks)
        return merged

    def _factor_parts(
        self, module: str, chosen: Sequence[tuple[Adapter, float]], settings: MergeSettings
    ) -> list[Part]:
        """Sparse factors, and PEFT's weights: sqrt(|w s|) on both, the sign on A."""
        members = [(a, w) for a, w in chosen if module in a.modules]
        if len(members) > 1:
            _check_common_rank(module, [a.modules[module] for a, _ in members])
        sparsify = method_of(settings).sparsify
        rescale = 1 / settings.density if sparsify is not None and sparsify.rescales else 1.0
        parts = []
        for adapter, weight in members:
            key, factors = self._sparse(adapter, module, settings)
            scale = np.float32(weight) * factors.scaling
            root = (np.sqrt(np.abs(scale)) * np.float32(rescale)).astype(np.float32)
            parts.append(Part(key, factors.a, factors.b, np.where(scale < 0, -root, root), root))
        return parts

    def _sparse(self, adapter: Adapter, module: str, settings: MergeSettings) -> tuple[str, AdapterModule]:
        """A module without the entries that the method drops, and the name of its content."""
        whole, key = adapter.modules[module], f"{adapter.digest}/{module}"
        sparsify = method_of(settings).sparsify
        if sparsify is None or settings.density == 1:
            return key, whole
        seed = f"{key}/{'drop' if sparsify.seeded else 'prune'}/{settings.density}/"
        seed += str(settings.dare_seed) if sparsify.seeded else ""
        sparse = self._sparsified.get(seed)
        if sparse is None:
            sparse = sparsify.module(whole, settings.density, seed)
            self._sparsified.put(seed, sparse)
        return seed, sparse

    def _allocate(self, parts: Parts, ranks: Mapping[str, int], digest: str, report: MergeReport) -> MergedAdapter:
        """A blend to be filled; its buffer goes back to the pool with it, so it is the buffer's only owner."""
        modules, end = {}, 0
        for name, members in parts.items():
            layers, n_in, n_out = len(members[0].weight_a), members[0].a.width, members[0].b.width
            start_b = end + aligned(layers * ranks[name] * n_in)
            modules[name] = MergedModule(
                layers=layers, rank=ranks[name], n_in=n_in, n_out=n_out, offset_a=end, offset_b=start_b
            )
            end = start_b + aligned(layers * ranks[name] * n_out)
        buffer = self._pool.take(end)
        merged = MergedAdapter(modules, digest, buffer, report)
        weakref.finalize(merged, self._pool.give, buffer).atexit = False
        return merged

    def _stack(self, merged: MergedAdapter, parts: Parts, module: str, side: Side, layers: slice) -> None:
        rows = self._gather(parts[module], side, layers, stacked=True)
        self._runner.run(f"{rows.graph}stack", rows.feeds, merged.address(module, side, layers.start)[0], rows.shape)

    def _combine(self, graph: str, merged: MergedAdapter, parts: Parts, module: str, side: Side, layers: slice) -> None:
        rows = self._gather(parts[module], side, layers, stacked=False)
        weights = np.array([[part.side(side)[1][layers.start] for part in parts[module]]], np.float32)
        feeds = {**rows.feeds, "weights": weights}
        if graph != "linear":
            feeds["ones"] = np.ones_like(weights)
        address, (rank, width) = merged.address(module, side, layers.start)
        self._runner.run(f"{rows.graph}{graph}", feeds, address, (1, (layers.stop - layers.start) * rank * width))

    def _recombine(
        self,
        merged: MergedAdapter,
        parts: Parts,
        recombined: Mapping[str, core_space.Recombination],
        module: str,
        side: Side,
        layers: slice,
    ) -> None:
        matrix = recombined[module].a if side == "A" else recombined[module].b
        if matrix is None:
            self._stack(merged, parts, module, side, layers)
            return
        rows = self._gather(parts[module], side, layers, stacked=True)
        address, (rank, width) = merged.address(module, side, layers.start)
        count = layers.stop - layers.start
        shape = np.array([count, matrix.shape[2], width], np.int64)
        feeds = {**rows.feeds, "mix": matrix[layers].astype(np.float32), "shape": shape}
        self._runner.run(f"{rows.graph}mix", feeds, address, (count, rank, width))

    def _gather(self, parts: Sequence[Part], side: Side, layers: slice, *, stacked: bool) -> Rows:
        if self._resident is not None and self._resident.takes(parts, side):
            return self._resident.gather(parts, side, layers, stacked=stacked)
        return self._host.gather(parts, side, layers, stacked=stacked)


def _exact_part(adapter: Adapter, name: str, weight: float) -> Part:
    """Weight and scale on A, as PEFT's 'cat' has them."""
    module = adapter.modules[name]
    scale = (np.float32(weight) * module.scaling).astype(np.float32)
    return Part(f"{adapter.digest}/{name}", module.a, module.b, scale, np.ones_like(scale))


def _named(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[tuple[str, float]]:
    return [(a.name, float(w)) for a, w in zip(adapters, weights, strict=True)]


def _check(adapters: Sequence[Adapter], weights: Sequence[float], settings: MergeSettings) -> None:
    if len(adapters) != len(weights):
        raise MergeError(f"{len(adapters)} adapters came with {len(weights)} weights; expected one for each")
    check_weights(dict(_named(adapters, weights)))
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
