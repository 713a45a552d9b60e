"""Blends quantised adapters into the tensors that a decoder is bound to; knows nothing of prompts or files.

Two families, never called by the same name:

* exact: the methods act on the updates ΔW_i = s_i A_i^T B_i, never formed. Any ranks, any sign of weight, and the
  result does not depend on how an update was factored.
* paper: the methods act on the factors A and B apart, as PEFT's `add_weighted_adapter` does; all but `cat` need
  adapters of one rank and depend on how (A, B) was factored.

The arithmetic runs in ONNX Runtime on the chosen device, from the quantised arrays, module by module: codes are
gathered on the host, go up once, and become values in one operation. docs/concepts/merging.md says when to use what.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from edgecompose import core_space, trimming
from edgecompose.adapter import Adapter, AdapterModule
from edgecompose.buffers import BufferPool, LruCache
from edgecompose.device import Device, OrtValue, Session, open_session, usable_cores
from edgecompose.errors import MergeError
from edgecompose.quantization import QuantizedFactor, unpack

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")
T = TypeVar("T")
U = TypeVar("U")
#: Weights are rounded to this step before they enter the content hash.
_WEIGHT_STEP = 1e-6
_LARGEST_WEIGHT = 1e6
#: Values that one run of a graph handles on a CPU: what it works on should stay in the last cache.
_CHUNK = 1 << 21
#: Slots begin at multiples of this many values (64 bytes).
_ALIGNMENT = 16
_TRIMMED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """One row of the table of methods.

    `parameters` are the fields of MergeSettings that it reads. `ranks` tells what rank the result has: the 'sum' of the
    ranks, the 'same' rank that all adapters must have, or a 'cap'. `cost` names the work for R stacked ranks, K
    adapters of rank r and n values a row.
    """

    name: str
    family: Literal["exact", "paper"]
    parameters: tuple[str, ...]
    ranks: Literal["sum", "same", "cap"]
    cost: str
    source: str

    @property
    def trims(self) -> Literal["prune", "drop"] | None:
        """How entries are dropped before they are combined."""
        if "density" not in self.parameters:
            return None
        return "drop" if "seed" in self.parameters else "prune"


_PEFT = "PEFT add_weighted_adapter"
_PASS = "R n, one pass"
_ROWS = "K r n, one pass"
_VOTES = "K r n, one pass, six operations a value"
_CORE = "2 R^2 n and three decompositions of R x R a layer"
_CORE_SPACE = "Core Space (arXiv 2509.17786)"
_TIES, _DARE = "TIES (arXiv 2306.01708)", "DARE (arXiv 2311.03099)"
METHODS: Mapping[str, MergeMethod] = {
    row.name: row
    for row in (
        MergeMethod("product", "exact", (), "sum", _PASS, "sum of w s A^T B by stacking (arXiv 2410.13025)"),
        MergeMethod(
            "svd", "exact", ("rank", "energy"), "cap", _CORE, "best approximation of product (Eckart and Young, 1936)"
        ),
        MergeMethod("core_ties", "exact", ("density",), "sum", _CORE, f"{_TIES} in {_CORE_SPACE}"),
        MergeMethod("core_prune", "exact", ("density",), "sum", _CORE, f"magnitude pruning in {_CORE_SPACE}"),
        MergeMethod("core_dare", "exact", ("density", "seed"), "sum", _CORE, f"{_DARE} in {_CORE_SPACE}"),
        MergeMethod("cat", "paper", (), "sum", _PASS, f"{_PEFT} 'cat' (arXiv 2602.21222)"),
        MergeMethod("linear", "paper", (), "same", _ROWS, f"{_PEFT} 'linear' (arXiv 2212.04089 on factors)"),
        MergeMethod(
            "ties", "paper", ("density", "majority_sign"), "same", _VOTES, f"{_PEFT} 'ties', {_TIES} on factors"
        ),
        MergeMethod("magnitude_prune", "paper", ("density",), "same", _ROWS, f"{_PEFT} 'magnitude_prune'"),
        MergeMethod(
            "dare_linear", "paper", ("density", "seed"), "same", _ROWS, f"{_PEFT} 'dare_linear', {_DARE} on factors"
        ),
        MergeMethod(
            "dare_ties", "paper", ("density", "seed", "majority_sign"), "same", _VOTES,
            f"{_PEFT} 'dare_ties', {_DARE} on factors",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """A method and its parameters; a method reads only those that its row of METHODS names.

    `density` in (0, 1] is the share of entries that prunes and drops keep; `seed` decides which entries a drop keeps.
    `rank` caps the rank of svd, None being the largest rank of its parts unless `energy` is given; `energy` in (0, 1]
    is the share of the squared norm that svd keeps at least. `norm_guard` rescales the blend of any method to the
    weighted mean norm of its parts.
    """

    method: str = "product"
    density: float = 0.5
    majority_sign: Literal["total", "frequency"] = "total"
    rank: int | None = None
    energy: float | None = None
    seed: int = 0
    norm_guard: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MergeError(f"merge method '{self.method}' is unknown; use one of {', '.join(METHODS)}")
        if not 0 < self.density <= 1:
            raise MergeError(f"density is {self.density}; a number in (0, 1] is wanted")
        if self.majority_sign not in ("total", "frequency"):
            raise MergeError(f"majority sign '{self.majority_sign}' is unknown; use total or frequency")
        if self.rank is not None and self.rank < 1:
            raise MergeError(f"rank is {self.rank}; 1 or more is wanted")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise MergeError(f"energy is {self.energy}; a number in (0, 1] is wanted")
        if self.seed < 0:
            raise MergeError(f"seed is {self.seed}; 0 or more is wanted")

    @property
    def row(self) -> MergeMethod:
        """The method's row in the table."""
        return METHODS[self.method]

    def parameters(self) -> dict[str, Any]:
        """The parameters that the method reads, by name."""
        return {name: getattr(self, name) for name in self.row.parameters}


@dataclass(frozen=True, slots=True)
class MergedModule:
    """Where the merged factors of one module lie: A (L, R, n_in) and B (L, R, n_out), as offsets in values."""

    layers: int
    rank: int
    n_in: int
    n_out: int
    offset_a: int
    offset_b: int

    def place(self, side: Side) -> tuple[int, tuple[int, int, int]]:
        """Offset (values) and shape of one factor."""
        if side == "A":
            return self.offset_a, (self.layers, self.rank, self.n_in)
        return self.offset_b, (self.layers, self.rank, self.n_out)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did to the sum that was asked for.

    `norm_factor` is what the norm guard multiplied the blend by (1 when it is off); `discarded_energy` is the share of
    the squared norm that svd cut off, in 0 .. 1.
    """

    norm_factor: float = 1.0
    discarded_energy: float = 0.0


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class MergedAdapter:
    """A blend on the device, float32, in one buffer; `digest` names its content. No module at all is the base alone."""

    modules: Mapping[str, MergedModule]
    digest: str
    buffer: OrtValue = None
    report: MergeReport = MergeReport()

    @property
    def bytes(self) -> int:
        """Size of its factors."""
        return sum(4 * math.prod(m.place(side)[1]) for m in self.modules.values() for side in SIDES)

    def address(self, module: str, side: Side, layer: int) -> tuple[int, tuple[int, int]]:
        """Device address and shape (R, n) of one layer's factor."""
        offset, (_, rank, width) = self.modules[module].place(side)
        return self.buffer.data_ptr() + 4 * (offset + layer * rank * width), (rank, width)

    def factors(self) -> dict[str, tuple[Float, Float]]:
        """A copy on the host: module -> A (L, R, n_in), B (L, R, n_out)."""
        if not self.modules:
            return {}
        flat, found = self.buffer.numpy(), {}
        for name, module in self.modules.items():
            parts = (module.place("A"), module.place("B"))
            a, b = (flat[offset : offset + math.prod(shape)].reshape(shape).copy() for offset, shape in parts)
            found[name] = (a, b)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One adapter's share in a module: factors, and weight times scaling in each layer, of A and of B, (L,)."""

    a: QuantizedFactor
    b: QuantizedFactor
    weight_a: Float
    weight_b: Float

    def side(self, side: Side) -> tuple[QuantizedFactor, Float]:
        return (self.a, self.weight_a) if side == "A" else (self.b, self.weight_b)


Parts = dict[str, list[_Part]]


class Merger:
    """Runs the merge graphs on one device, each session opened once. Safe between threads."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._session = functools.lru_cache(maxsize=None)(self._open)
        self._pool = BufferPool(device)
        self._trimmed: LruCache[AdapterModule] = LruCache(_TRIMMED_BYTES, lambda m: m.a.codes.nbytes + m.b.codes.nbytes)
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
            parts = [_exact_part(adapters[i].modules[module], 1.0) for i in present]
            grams = self._grams({module: parts})[module]
            total[np.ix_(present, present)] += core_space.inner_products(*grams, _ranks(parts))
        return total

    def norm(self, merged: MergedAdapter) -> float:
        """Frobenius norm of the whole update of a blend."""
        total = 0.0
        for name, module in merged.modules.items():
            norms = self._device.empty((module.layers,))
            views = {side.lower(): (merged.address(name, side, 0)[0], module.place(side)[1]) for side in SIDES}
            self._run("norm", {}, norms.data_ptr(), (module.layers,), views)
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
            parts = {m: self._paper_parts(m, chosen, settings) for m in modules}
            merged = self._allocate(parts, {m: p[0].a.rank for m, p in parts.items()}, digest, MergeReport(norm_factor))
            kind = settings.method.removeprefix("dare_")
            graph = f"ties_{settings.majority_sign}" if kind == "ties" else "linear"
            self._map(lambda item: self._combine(graph, merged, parts, *item), _layer_chunks(parts, even_weights=True))
        elif settings.method in ("product", "cat"):
            parts = {m: [_exact_part(a.modules[m], w) for a, w in chosen if m in a.modules] for m in modules}
            ranks = {m: sum(_ranks(p)) for m, p in parts.items()}
            merged = self._allocate(parts, ranks, digest, MergeReport(norm_factor))
            self._map(lambda item: self._stack(merged, parts, *item), _layer_chunks(parts))
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
        svd = settings.method == "svd"
        parts = {
            m: [_exact_part(a.modules[m], w if svd else 1.0) for a, w in chosen if m in a.modules] for m in modules
        }
        grams = self._grams(parts)

        def solve(module: str) -> core_space.Mixes:
            if svd:
                cap = settings.rank
                if cap is None and settings.energy is None:
                    cap = max(_ranks(parts[module]))
                return core_space.truncate(*grams[module], cap, settings.energy)
            members = [(a, w) for a, w in chosen if module in a.modules]
            return _core_mixes(module, members, grams[module], _ranks(parts[module]), settings)

        mixes = {module: solve(module) for module in modules}  # numpy's BLAS has threads of its own
        total = sum(float(mix.energy.sum()) for mix in mixes.values())
        kept = sum(float(mix.kept_energy.sum()) for mix in mixes.values())
        report = MergeReport(norm_factor, max(0.0, 1 - kept / total) if total else 0.0)
        merged = self._allocate(parts, {m: mix.a.shape[1] for m, mix in mixes.items()}, digest, report)
        self._map(lambda item: self._mix(merged, parts, mixes, *item), _layer_chunks(parts))
        return merged

    def _grams(self, parts: Parts) -> dict[str, tuple[Double, Double]]:
        """Inner products of the stacked rows of each module, A A^T and B B^T: (L, R, R)."""
        found: dict[tuple[str, Side], Float] = {}
        for module, members in parts.items():
            layers, rank = len(members[0].weight_a), sum(_ranks(members))
            for side in SIDES:
                found[module, side] = np.empty((layers, rank, rank), np.float32)

        def fill(item: tuple[str, Side, slice]) -> None:
            module, side, layers = item
            rows = _gather([p.side(side) for p in parts[module]], layers, stacked=True)
            count, rank = found[module, side][layers].shape[:2]
            out = self._device.empty((count, rank, rank))
            shape = np.array([count, rank, parts[module][0].side(side)[0].width], np.int64)
            self._run("gram", {**rows, "shape": shape}, out.data_ptr(), (count, rank, rank))
            found[module, side][layers] = out.numpy()

        self._map(fill, _layer_chunks(parts))
        return {m: (found[m, "A"].astype(np.float64), found[m, "B"].astype(np.float64)) for m in parts}

    def _paper_parts(
        self, module: str, chosen: Sequence[tuple[Adapter, float]], settings: MergeSettings
    ) -> list[_Part]:
        """Factors trimmed as the method wants them, and PEFT's weights: sqrt(|w s|) on both, the sign on A."""
        members = [(a, w) for a, w in chosen if module in a.modules]
        if len(members) > 1:
            _check_common_rank(module, [a.modules[module] for a, _ in members])
        rescale = 1 / settings.density if settings.row.trims == "drop" else 1.0
        parts = []
        for adapter, weight in members:
            trimmed = self._trim(adapter, module, settings)
            scale = np.float32(weight) * trimmed.scaling
            root = (np.sqrt(np.abs(scale)) * np.float32(rescale)).astype(np.float32)
            parts.append(_Part(trimmed.a, trimmed.b, np.where(scale < 0, -root, root), root))
        return parts

    def _trim(self, adapter: Adapter, module: str, settings: MergeSettings) -> AdapterModule:
        found = adapter.modules[module]
        kind = settings.row.trims
        if kind is None or settings.density == 1:
            return found
        key = f"{adapter.digest}/{module}/{kind}/{settings.density}/{settings.seed if kind == 'drop' else ''}"
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
        return trimmed

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
        rows = _gather([p.side(side) for p in parts[module]], layers, stacked=True)
        self._run("stack", rows, merged.address(module, side, layers.start)[0], rows["codes"].shape)

    def _combine(self, graph: str, merged: MergedAdapter, parts: Parts, module: str, side: Side, layers: slice) -> None:
        sides = [p.side(side) for p in parts[module]]
        feeds = _gather(sides, layers, stacked=False)
        feeds["weights"] = np.array([[weight[layers.start] for _, weight in sides]], np.float32)
        if graph != "linear":
            feeds["ones"] = np.ones_like(feeds["weights"])
        address, (rank, width) = merged.address(module, side, layers.start)
        self._run(graph, feeds, address, (1, (layers.stop - layers.start) * rank * width))

    def _mix(
        self, merged: MergedAdapter, parts: Parts, mixes: Mapping[str, core_space.Mixes], module: str, side: Side,
        layers: slice,
    ) -> None:  # fmt: skip
        feeds = _gather([p.side(side) for p in parts[module]], layers, stacked=True)
        mix = mixes[module].a if side == "A" else mixes[module].b
        feeds["mix"] = mix[layers].astype(np.float32)
        address, (rank, width) = merged.address(module, side, layers.start)
        feeds["shape"] = np.array([layers.stop - layers.start, mix.shape[2], width], np.int64)
        self._run("mix", feeds, address, (layers.stop - layers.start, rank, width))

    def _run(
        self,
        graph: str,
        feeds: Mapping[str, npt.NDArray[Any]],
        address: int,
        shape: Sequence[int],
        views: Mapping[str, tuple[int, Sequence[int]]] | None = None,
    ) -> None:
        """Run a graph on host arrays and on float32 views of device memory; write its result to `address`."""
        session, kind = self._session(graph), self._device.kind
        binding = session.io_binding()
        placed = {name: self._device.place(value) for name, value in feeds.items()}
        for name, value in placed.items():
            binding.bind_ortvalue_input(name, value)
        for name, (place, dims) in (views or {}).items():
            binding.bind_input(name, kind, 0, np.float32, list(dims), place)
        binding.bind_output("merged", kind, 0, np.float32, list(shape), address)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _map(self, function: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """Apply a function to all items, on the cores where the device is a CPU."""
        return list(map(function, items) if self._threads is None else self._threads.map(function, items))

    def _open(self, graph: str) -> Session:
        content = (resources.files("edgecompose") / "graphs" / f"{graph}.onnx").read_bytes()
        threads = 1 if self._device.kind == "cpu" else None
        return open_session(content, self._device, name=f"merge {graph}", threads=threads)


def composition_digest(adapters: Mapping[str, str], weights: Mapping[str, float], settings: MergeSettings) -> str:
    """Content hash (sha256, hexadecimal) of a blend; the order of adapters does not matter.

    Args:
        adapters: name -> digest of the adapter's file.
        weights: name -> weight, rounded to 1e-6 for the hash.
    """
    blend = sorted((digest, _hashed_weight(weights[name])) for name, digest in adapters.items())
    method = "product" if settings.method == "cat" else settings.method
    content = {"blend": blend, "method": method, "norm_guard": settings.norm_guard, **settings.parameters()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hashed_weight(weight: float) -> int | str:
    return round(weight / _WEIGHT_STEP) if math.isfinite(weight) else str(weight)


def _core_mixes(
    module: str,
    members: Sequence[tuple[Adapter, float]],
    grams: tuple[Double, Double],
    ranks: tuple[int, ...],
    settings: MergeSettings,
) -> core_space.Mixes:
    space = core_space.core_space(*grams, ranks)
    weights, cores = np.array([w for _, w in members], np.float64), space.cores
    if settings.method == "core_dare":
        for core, (adapter, _) in zip(cores, members, strict=True):
            core *= trimming.random_mask(core.shape, settings.density, f"{adapter.digest}/{module}/{settings.seed}")
        cores = cores / settings.density
    else:
        cores = core_space.prune(cores, trimming.kept_entries(settings.density, cores[0, 0].size))
    combine = core_space.disjoint_mean if settings.method == "core_ties" else core_space.weighted_sum
    energy = np.ones(len(cores[0]))
    return core_space.Mixes(*space.mixes(combine(cores, weights)), energy, energy)


def _exact_part(module: AdapterModule, weight: float) -> _Part:
    """Weight and scale on A, as PEFT's 'cat' has them."""
    scale = (np.float32(weight) * module.scaling).astype(np.float32)
    return _Part(module.a, module.b, scale, np.ones_like(scale))


def _ranks(parts: Sequence[_Part]) -> tuple[int, ...]:
    return tuple(part.a.rank for part in parts)


def _aligned(values: int) -> int:
    return -(-values // _ALIGNMENT) * _ALIGNMENT


def _layer_chunks(parts: Parts, *, even_weights: bool = False) -> Iterator[tuple[str, Side, slice]]:
    """Runs of layers whose rows together have about _CHUNK values, and one weight per adapter where wanted."""
    for module, members in parts.items():
        for side in SIDES:
            sides = [p.side(side) for p in members]
            weights = np.stack([weight for _, weight in sides])
            a_layer = sum(factor.rank * factor.width for factor, _ in sides)
            most, layers = max(1, _CHUNK // a_layer), weights.shape[1]
            start = 0
            for stop in range(1, layers + 1):
                uneven = even_weights and stop < layers and bool((weights[:, stop] != weights[:, start]).any())
                if stop == layers or stop - start == most or uneven:
                    yield module, side, slice(start, stop)
                    start = stop


def _gather(
    sides: Sequence[tuple[QuantizedFactor, Float]], layers: slice, *, stacked: bool
) -> dict[str, npt.NDArray[Any]]:
    """What a graph reads of some layers: rows layer by layer with the weights in, or adapter by adapter without."""
    first, count = sides[0][0], layers.stop - layers.start
    width, blocks = first.width, first.scales.shape[2]
    ranks = [factor.rank for factor, _ in sides]
    outer = (count, sum(ranks)) if stacked else (len(sides), count, ranks[0])
    codes, scales = np.empty((*outer, width), np.uint8), np.empty((*outer, blocks), np.float16)
    zero_points, gains = np.empty((*outer, blocks), np.uint8), np.empty((*outer, 1), np.float32)
    start = 0
    for i, (factor, weight) in enumerate(sides):
        place: Any = (slice(None), slice(start, start + factor.rank)) if stacked else i
        unpack(factor, layers, codes[place])
        scales[place] = factor.scales[layers]
        zero_points[place] = factor.zero_point
        gain = np.float32(factor.gain)
        gains[place] = (gain * weight[layers])[:, None, None] if stacked else gain
        start += factor.rank
    block = width // blocks
    return {
        "codes": codes.reshape(-1, block), "zero_points": zero_points.reshape(-1),
        "scales": scales.reshape(-1, blocks), "gains": gains.reshape(-1, 1),
    }  # fmt: skip


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
