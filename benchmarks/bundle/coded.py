"""Factors at every depth of one coder, and schemes that choose the bits of each component."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.bundle.coders import Coder, rounded
from benchmarks.bundle.factors import Double, Factors, Float, Pair, component_norms, dot, row_gain, squared_norm

#: Header bits: a factor's float32 gain, a component's two 4-bit depths, a module's number of high components.
GAIN_BITS, _DEPTH_TAGS, _SPLIT_TAG = 32, 8, 8
#: Bits of each component's row of A and of B, both (r, L), by module; 0 drops the component.
Choice = Mapping[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
#: Header bits of a module, by its numbers of components and of layers.
Tags = Callable[[int, int], int]
#: Bits of a component's row of A and of its row of B.
Depths = tuple[int, int]
#: Squared error (r, L, options) and bits (options,) of the options of a module.
Table = tuple[Double, Double]
_LOG2_PRICES, _BISECTIONS = (-60.0, 60.0), 60


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """The factors that a scheme gives back, and the bits that it takes."""

    scheme: str
    factors: Factors
    bits: float


def constant(factors: Factors, bits: int) -> Choice:
    """The same bits everywhere."""
    return {name: (np.full(p.a.shape[:2], bits), np.full(p.a.shape[:2], bits)) for name, p in factors.items()}


def split_by_energy(factors: Factors, rho: float, *, high: int, low: int) -> Choice:
    """`high` bits for the fewest components of each module and layer that hold the share `rho` of |ΔW|²."""
    result = {}
    for name, pair in factors.items():
        energy = component_norms(pair)
        before = np.cumsum(energy, 0) - energy
        bits = np.where(before < rho * energy.sum(0), high, low)
        result[name] = (bits, bits)
    return result


def no_tags(components: int, layers: int) -> int:
    """A scheme whose choice needs no header."""
    return 0


def split_tags(components: int, layers: int) -> int:
    """The number of high components of each layer."""
    return _SPLIT_TAG * layers


def depth_tags(components: int, layers: int) -> int:
    """The depths of each component."""
    return _DEPTH_TAGS * components * layers


class Coded:
    """Factors coded by one coder at every depth; schemes only choose among them."""

    def __init__(self, factors: Factors, block: int, coder: Coder, *, unbiased: bool = False) -> None:
        self._factors, self._block, self._coder, self._unbiased = factors, block, coder, unbiased
        self._cache: dict[tuple[str, int], Pair] = {}

    def stored(self, scheme: str, choice: Choice, tags: Tags) -> Stored:
        """The factors with the chosen bits."""
        total, result = 0, {}
        for name, pair in self._factors.items():
            bits_a, bits_b = choice[name]
            a, b = np.zeros_like(pair.a), np.zeros_like(pair.b)
            for bits in {int(x) for side in choice[name] for x in np.unique(side)}:
                coded = self._at(name, bits)
                a[bits_a == bits] = coded.a[bits_a == bits]
                b[bits_b == bits] = coded.b[bits_b == bits]
            for side, depths in ((a, bits_a), (b, bits_b)):
                total += sum(self._row_bits(side.shape[2], int(x)) for x in depths.ravel()) + GAIN_BITS
            total += tags(*pair.a.shape[:2])
            result[name] = Pair(a, b)
        return Stored(scheme, result, total)

    def within(self, scheme: str, budget: float, options: Sequence[Depths], *, ladder: bool = False) -> Stored:
        """Bits for each component out of `options`, least error with `budget` bits a parameter.

        The choice minimises error + price * bits of each component, at the least price within the budget. With
        `ladder`, all modules and layers share the bits of their first component, of their second, and so on.
        """
        tables = self._tables(options, shared=ladder)
        components = 0 if ladder else sum(pair.a.shape[0] * pair.a.shape[1] for pair in self._factors.values())
        tags = _DEPTH_TAGS * components + 2 * GAIN_BITS * len(self._factors)
        allowed = budget * sum(pair.a.size + pair.b.size for pair in self._factors.values()) - tags
        low, high = _LOG2_PRICES
        for _ in range(_BISECTIONS):
            price = (low + high) / 2
            bits = [float(cost[_cheapest(error, cost, price)].sum()) for error, cost in tables.values()]
            low, high = (price, high) if (bits[0] if ladder else sum(bits)) > allowed else (low, price)
        depths, choice = np.array(options), {}
        for name, (error, cost) in tables.items():
            rows = np.broadcast_to(depths[_cheapest(error, cost, high)], (*self._factors[name].a.shape[:2], 2))
            choice[name] = (rows[..., 0], rows[..., 1])
        return self.stored(scheme, choice, no_tags if ladder else depth_tags)

    def _tables(self, options: Sequence[Depths], *, shared: bool) -> dict[str, Table]:
        """The table of each module; with `shared`, one for all modules and layers together."""
        tables = {name: self._option_table(name, options) for name in self._factors}
        if not shared:
            return tables
        error = sum((error.sum(1, keepdims=True) for error, _ in tables.values()), np.zeros(1))
        cost = sum((cost * error.shape[1] for error, cost in tables.values()), np.zeros(1))
        return dict.fromkeys(tables, (error, cost))

    def _option_table(self, name: str, options: Sequence[Depths]) -> Table:
        """Squared error of each component taken alone, over the mean of all; and bits."""
        pair = self._factors[name]
        unit = sum(squared_norm(p) for p in self._factors.values()) / sum(p.a.shape[0] for p in self._factors.values())
        errors, costs = [], []
        products = component_norms(pair)
        for bits_a, bits_b in options:
            a, b = self._at(name, bits_a).a, self._at(name, bits_b).b
            mixed, own = dot(pair.a, a) * dot(pair.b, b), dot(a, a) * dot(b, b)
            errors.append((products - 2 * mixed + own) / unit)
            costs.append(self._row_bits(a.shape[2], bits_a) + self._row_bits(b.shape[2], bits_b))
        return np.stack(errors, -1), np.array(costs, np.float64)

    def _row_bits(self, width: int, bits: int) -> int:
        zeros = bits if self._coder is rounded and bits > 1 else 0
        return bits * width + math.ceil(width / self._block) * (16 + zeros) if bits else 0

    def _at(self, name: str, bits: int) -> Pair:
        if (name, bits) not in self._cache:
            pair = self._factors[name]
            self._cache[name, bits] = Pair(self._code(pair.a, bits), self._code(pair.b, bits))
        return self._cache[name, bits]

    def _code(self, rows: Float, bits: int) -> Float:
        """Blocks along the last axis; the last block is shorter if the width is no multiple of the block."""
        if not bits:
            return np.zeros_like(rows)
        whole = rows.shape[2] // self._block * self._block
        parts = [rows[..., :whole].reshape(*rows.shape[:2], -1, self._block)] if whole else []
        parts += [rows[..., None, whole:]] if whole < rows.shape[2] else []
        values = np.concatenate([self._coder(part, bits).reshape(*rows.shape[:2], -1) for part in parts], axis=-1)
        return np.asarray(values * row_gain(rows, values)[..., None], np.float32) if self._unbiased else values


def _cheapest(error: Double, cost: Double, log2_price: float) -> npt.NDArray[np.intp]:
    """The option with the least error + price * bits of each component."""
    return np.asarray((error + 2.0**log2_price * cost).argmin(-1))
