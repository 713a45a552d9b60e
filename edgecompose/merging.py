"""Blends quantised adapters into the tensors that a decoder is bound to; knows nothing of prompts or files.

Two families, never called by the same name:

* exact: `product` forms sum w_i s_i A_i B_i by stacking ranks. Any ranks, any sign of weight.
* paper: `cat` (the same stacking), `linear`, `ties`, `magnitude_prune` act on the factors A and B apart,
  as PEFT's `add_weighted_adapter` does; they need adapters of one rank and depend on how (A, B) was factored.

The arithmetic runs in ONNX Runtime on the chosen device, from the quantised arrays.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgecompose.adapter import Adapter, AdapterModule
from edgecompose.device import Device, OrtValue, Session, open_session
from edgecompose.errors import MergeError
from edgecompose.quantization import QuantizedFactor, unpack_codes

Float = npt.NDArray[np.float32]
#: Weights are rounded to this step before they enter the content hash.
_WEIGHT_STEP = 1e-6
_LARGEST_WEIGHT = 1e6


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """One row of the table of methods.

    `graph` names the ONNX graph; `stacks` tells whether ranks add up (else they must agree);
    `prunes` whether `density` is used; `votes` whether `majority_sign` is.
    """

    name: str
    family: Literal["exact", "paper"]
    graph: str
    stacks: bool
    source: str
    prunes: bool = False
    votes: bool = False


_PEFT = "PEFT add_weighted_adapter"
METHODS: Mapping[str, MergeMethod] = {
    row.name: row
    for row in (
        MergeMethod(
            "product", "exact", "product", True, "sum of w s A B by rank stacking, PEFT 'cat' (arXiv 2410.13025)"
        ),
        MergeMethod("cat", "paper", "product", True, f"{_PEFT} 'cat' (arXiv 2602.21222)"),
        MergeMethod("linear", "paper", "linear", False, f"{_PEFT} 'linear' (arXiv 2212.04089 on factors)"),
        MergeMethod("ties", "paper", "ties", False, f"{_PEFT} 'ties' (arXiv 2306.01708 on factors)", True, True),
        MergeMethod("magnitude_prune", "paper", "magnitude_prune", False, f"{_PEFT} 'magnitude_prune'", True),
    )
}


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """A method and its parameters; `density` lies in (0, 1]."""

    method: str = "product"
    density: float = 0.5
    majority_sign: Literal["total", "frequency"] = "total"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MergeError(f"merge method '{self.method}' is unknown; use one of {', '.join(METHODS)}")
        if not 0 < self.density <= 1:
            raise MergeError(f"density is {self.density}; a number in (0, 1] is wanted")
        if self.majority_sign not in ("total", "frequency"):
            raise MergeError(f"majority sign '{self.majority_sign}' is unknown; use total or frequency")

    @property
    def row(self) -> MergeMethod:
        """The method's row in the table."""
        return METHODS[self.method]


@dataclass(frozen=True, slots=True, eq=False)
class MergedModule:
    """Merged factors of one module on the device: `a` (L, in, R), `b` (L, R, out), float32."""

    a: OrtValue
    b: OrtValue
    rank: int


@dataclass(frozen=True, slots=True, eq=False)
class MergedAdapter:
    """A blend on the device; `digest` names its content. No module at all is the base alone."""

    modules: Mapping[str, MergedModule]
    digest: str

    @property
    def bytes(self) -> int:
        """Size of all its tensors."""
        shapes = (value.shape() for m in self.modules.values() for value in (m.a, m.b))
        return sum(4 * math.prod(shape) for shape in shapes)


class Merger:
    """Runs the merge graphs on one device, each session opened once."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._session = functools.lru_cache(maxsize=None)(self._open)

    def merge(self, adapters: Sequence[Adapter], weights: Sequence[float], settings: MergeSettings) -> MergedAdapter:
        """Blend adapters.

        Args:
            adapters: any number; none gives the base alone.
            weights: one for each, dimensionless, finite, used as given (not renormalised).

        Raises:
            MergeError: unequal numbers, a weight that is not finite, ranks that differ under a method that
                needs one rank, or a density that keeps no entry.
        """
        _check(adapters, weights, settings)
        if len(adapters) == 1 and settings.row.prunes:
            settings = MergeSettings("linear")  # PEFT does so: one adapter is neither pruned nor voted on
        digest = composition_digest({a.name: a.digest for a in adapters}, dict(_named(adapters, weights)), settings)
        modules = {}
        for module in sorted({m for a in adapters for m in a.modules}):
            parts = [(a.modules[module], w) for a, w in zip(adapters, weights, strict=True) if module in a.modules]
            modules[module] = self._merge_module(module, parts, settings)
        return MergedAdapter(modules, digest)

    def _merge_module(
        self, module: str, parts: Sequence[tuple[AdapterModule, float]], settings: MergeSettings
    ) -> MergedModule:
        scale = np.stack([np.float32(w) * m.scaling for m, w in parts])  # (K, L)
        if settings.row.stacks:
            ranks = [m.rank for m, _ in parts]
            weights_a = np.repeat(scale, ranks, axis=0)
            weights_b = np.ones_like(weights_a)
            rank = sum(ranks)
        else:
            rank = parts[0][0].rank if len(parts) == 1 else _common_rank(module, [m for m, _ in parts])
            weights_b = np.sqrt(np.abs(scale))
            weights_a = np.where(scale < 0, -weights_b, weights_b)
        a = self._merge_factor("A", [m.a for m, _ in parts], weights_a, rank, settings)
        b = self._merge_factor("B", [m.b for m, _ in parts], weights_b, rank, settings)
        return MergedModule(a, b, rank)

    def _merge_factor(
        self, side: str, factors: Sequence[QuantizedFactor], weights: Float, rank: int, settings: MergeSettings
    ) -> OrtValue:
        bits = 4 if all(f.bits == 4 for f in factors) else 8
        codes = [f.codes if f.bits == bits else unpack_codes(f) for f in factors]
        gains = [np.full((f.codes.shape[0], 1), f.gain, np.float32) for f in factors]
        feeds: dict[str, npt.NDArray[Any]] = {
            "codes": np.concatenate(codes), "scales": np.concatenate([f.scales for f in factors]),
            "gains": np.concatenate(gains), "weights": weights.astype(np.float32),
        }  # fmt: skip
        width, layers = factors[0].width, factors[0].codes.shape[1]
        if settings.row.prunes:
            feeds["kept"] = np.array([_kept(settings.density, rank * width)], np.int64)
        graph = f"ties_{settings.majority_sign}" if settings.row.votes else settings.row.graph
        shape = (layers, width, rank) if side == "A" else (layers, rank, width)
        return self._run(f"{graph}.{side}.int{bits}", feeds, shape)

    def _run(self, graph: str, feeds: Mapping[str, npt.NDArray[Any]], shape: Sequence[int]) -> OrtValue:
        session = self._session(graph)
        binding = session.io_binding()
        placed = {name: self._device.place(value) for name, value in feeds.items()}
        for name, value in placed.items():
            binding.bind_ortvalue_input(name, value)
        merged = self._device.empty(shape)
        binding.bind_ortvalue_output("merged", merged)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return merged

    def _open(self, graph: str) -> Session:
        content = (resources.files("edgecompose") / "graphs" / f"{graph}.onnx").read_bytes()
        return open_session(content, self._device, name=f"merge {graph}")


def composition_digest(adapters: Mapping[str, str], weights: Mapping[str, float], settings: MergeSettings) -> str:
    """Content hash (sha256, hexadecimal) of a blend; the order of adapters does not matter.

    Args:
        adapters: name -> digest of the adapter's file.
        weights: name -> weight, rounded to 1e-6 for the hash.
    """
    blend = sorted((digest, round(weights[name] / _WEIGHT_STEP)) for name, digest in adapters.items())
    row = settings.row
    parameters = {
        "density": settings.density if row.prunes else None,
        "majority_sign": settings.majority_sign if row.votes else None,
    }
    content = json.dumps({"blend": blend, "method": row.graph, **parameters}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


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


def _common_rank(module: str, parts: Sequence[AdapterModule]) -> int:
    """The one rank of a module in all adapters and layers, as the factor-wise methods need it."""
    ranks = {int(r) for m in parts for r, s in zip(m.ranks, m.scaling, strict=True) if s != 0}
    ranks |= {m.rank for m in parts}
    if len(ranks) != 1:
        raise MergeError(
            f"module '{module}' has ranks {sorted(ranks)}; factor-wise methods need one rank, use method product or cat"
        )
    return ranks.pop()


def _kept(density: float, entries: int) -> int:
    """How many entries of a tensor a density keeps: floor(density * entries), as PEFT counts."""
    kept = int(density * entries)
    if kept == 0:
        least = math.ceil(1e6 / entries) / 1e6
        raise MergeError(f"density {density} keeps none of {entries} entries; raise it to at least {least}")
    return kept
