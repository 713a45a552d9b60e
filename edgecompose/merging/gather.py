"""Gathers rows of quantised factors for the merge graphs.

The rows of a module's factor in several adapters are needed either stacked layer by layer (each layer's rows of the
first adapter, then of the second, ...) or adapter by adapter. Two sources give them:

* `HostRows` gathers codes on the host, one byte a code, or float16 for graphs that begin with `half_`, in memory that
  each thread uses again.
* `ResidentRows` keeps the packed codes of every adapter of recent blends on the device, in one array for each width,
  so that a merge sends up nothing but row numbers and weights. Graphs for it begin with `resident4_` or `resident8_`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.quantization import Bits, Bytes, QuantizedFactor, dequantize, quantize, unpack, unpack_into
from edgecompose.engine.device import Device, OrtValue, View
from edgecompose.engine.merged import SIDES, Side

Float = npt.NDArray[np.float32]
#: Width of the blocks that the graphs of resident rows are made for.
RESIDENT_BLOCK = 32
_FEWEST_ROWS = 1024
#: Copies bytes (uint8) or values (float32) of the device to an address of the device.
Copy = Callable[[OrtValue, int], None]
#: Values that one run of a graph handles: what it works on should stay in a CPU's last cache.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 25}


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One adapter's share in a module: factors, and weight times scaling in each layer, of A and of B, (L,).

    `key` names the content of the factors.
    """

    key: str
    a: QuantizedFactor
    b: QuantizedFactor
    weight_a: Float
    weight_b: Float

    def side(self, side: Side) -> tuple[QuantizedFactor, Float]:
        """The factor of one side, and its weights."""
        return (self.a, self.weight_a) if side == "A" else (self.b, self.weight_b)


#: The shares of some adapters in each module.
Parts = dict[str, list[Part]]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What a graph reads of some layers: the beginning of its name, its inputs, and the shape of the values."""

    graph: str
    feeds: Mapping[str, npt.NDArray[Any] | View]
    shape: tuple[int, ...]


#: Rows of one side of a module in some layers.
Gather = Callable[[Sequence[Part], Side, slice], Rows]


def ranks_of(parts: Sequence[Part]) -> tuple[int, ...]:
    """The rank of each."""
    return tuple(part.a.rank for part in parts)


def layer_chunks(
    parts: Parts, device: Device, *, even_weights: bool = False, copies: int = 1
) -> Iterator[tuple[str, Side, slice]]:
    """Runs of layers to be merged in one pass, of one weight per adapter where that is required.

    Args:
        copies: how many arrays of all values the graph holds at a time.
    """
    for module, members in parts.items():
        for side in SIDES:
            sides = [part.side(side) for part in members]
            layers = len(sides[0][1])
            a_layer = copies * sum(factor.rank * factor.width for factor, _ in sides)
            most = max(1, _CHUNK[device.kind] // a_layer)
            cuts = {0, layers}
            if even_weights:
                weights = np.stack([weight for _, weight in sides])
                cuts |= set((np.flatnonzero((weights[:, 1:] != weights[:, :-1]).any(axis=0)) + 1).tolist())
            ends = sorted(cuts)
            for first, last in zip(ends, ends[1:], strict=False):
                for start in range(first, last, most):
                    yield module, side, slice(start, min(start + most, last))


class HostRows:
    """Gathers codes on the host. What it returns is valid until the same thread asks again."""

    def __init__(self) -> None:
        self._local = threading.local()

    def gather(self, parts: Sequence[Part], side: Side, layers: slice, *, stacked: bool) -> Rows:
        """Rows of one side of some layers.

        Args:
            stacked: rows layer by layer with the weights in their gains; otherwise adapter by adapter, of one rank,
                without them.
        """
        sides = [part.side(side) for part in parts]
        half = any(factor.bits == 16 for factor, _ in sides)
        if half:
            sides = [(_half_form(factor), weight) for factor, weight in sides]
        first, count = sides[0][0], layers.stop - layers.start
        width, blocks, ranks = first.width, first.scales.shape[2], [factor.rank for factor, _ in sides]
        rows, outer = count * sum(ranks), (count, sum(ranks)) if stacked else (len(sides) * count, ranks[0])
        codes = self._scratch(first.codes.dtype.name, rows * width, first.codes.dtype.type).reshape(outer[0], -1)
        scales = self._scratch("scales", rows * blocks, np.float16).reshape(outer[0], -1)
        zero_points = self._scratch("zero_points", rows * blocks, np.uint8).reshape(outer[0], -1)
        start = 0
        for i, (factor, _) in enumerate(sides):
            across = slice(start, start + factor.rank) if stacked else slice(0, factor.rank)
            along = slice(0, count) if stacked else slice(i * count, (i + 1) * count)
            unpack_into(codes[along, across.start * width : across.stop * width], factor, layers)
            in_blocks = slice(across.start * blocks, across.stop * blocks)
            scales[along, in_blocks] = factor.scales[layers].reshape(count, -1)
            if not half:
                zero_points[along, in_blocks] = factor.zero_point
            start += factor.rank
        feeds: dict[str, npt.NDArray[Any]] = {
            "codes": codes.reshape(-1, width // blocks),
            "scales": scales.reshape(-1, blocks),
            "gains": _gains(sides, layers, stacked=stacked, own=True),
        }
        if not half:
            feeds["zero_points"] = zero_points.reshape(-1)
        return Rows("half_" if half else "", feeds, feeds["codes"].shape)

    def _scratch(self, name: str, size: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
        """Memory of this thread: fresh pages would cost as much as what is written to them."""
        scratch: npt.NDArray[Any] | None = getattr(self._local, name, None)
        if scratch is None or scratch.size < size:
            scratch = np.empty(size, dtype)
            setattr(self._local, name, scratch)
        return scratch[:size]


@dataclass(slots=True, eq=False)
class _Pool:
    """Rows of one width and bits on the device, and where the factors lie that were placed there."""

    codes: OrtValue
    scales: OrtValue
    capacity: int
    used: int
    first: dict[str, int]

    def views(self) -> dict[str, View]:
        """The rows that are in use, as inputs of a graph."""
        codes, scales = (View(v, v.data_ptr(), (self.used, v.shape()[1]), t) for v, t in self._arrays())
        return {"pool": codes, "pool_scales": scales}

    def _arrays(self) -> tuple[tuple[OrtValue, type[np.generic]], ...]:
        return (self.codes, np.uint8), (self.scales, np.float32)


class ResidentRows:
    """Quantised rows on the device; beyond `limit_bytes` they are dropped and copied again when needed.

    Args:
        copy: how the device copies an array to an address of its own.
    """

    def __init__(self, device: Device, copy: Copy, limit_bytes: int = 1 << 30) -> None:
        self._device, self._copy, self._limit = device, copy, limit_bytes
        self._pools: dict[tuple[int, Bits], _Pool] = {}
        self._order = device.place(np.arange(_FEWEST_ROWS, dtype=np.int32))
        self._lock = threading.Lock()

    @staticmethod
    def takes(parts: Sequence[Part], side: Side) -> bool:
        """Whether the graphs of resident rows can read these factors."""
        return all(f.block == RESIDENT_BLOCK and f.bits != 16 for f, _ in (part.side(side) for part in parts))

    @property
    def bytes(self) -> int:
        """Size of what is kept."""
        return sum(_row_bytes(width, bits) * pool.capacity for (width, bits), pool in self._pools.items())

    def gather(self, parts: Sequence[Part], side: Side, layers: slice, *, stacked: bool) -> Rows:
        """As `HostRows.gather`; only row numbers and gains go up."""
        sides = [part.side(side) for part in parts]
        bits: Bits = 8 if any(factor.bits == 8 for factor, _ in sides) else 4
        width, count = sides[0][0].width, layers.stop - layers.start
        rows = count * sum(factor.rank for factor, _ in sides)
        with self._lock:
            pool = self._ensure([(f"{p.key}/{side}", f) for p, (f, _) in zip(parts, sides, strict=True)], bits)
            firsts = [pool.first[f"{part.key}/{side}"] for part in parts]
            feeds: dict[str, Any] = {**pool.views(), "order": self._counting(rows)}
        numbers = [
            (first + np.arange(layers.start * f.rank, layers.stop * f.rank, dtype=np.int32)).reshape(count, f.rank)
            for first, (f, _) in zip(firsts, sides, strict=True)
        ]
        joined = np.concatenate(numbers, axis=1) if stacked else np.stack(numbers)
        feeds["numbers"] = np.asarray(joined, np.int32).reshape(-1)
        feeds["gains"] = _gains(sides, layers, stacked=stacked, own=False)
        return Rows(f"resident{bits}_", feeds, (rows, width))

    def _ensure(self, factors: Sequence[tuple[str, QuantizedFactor]], bits: Bits) -> _Pool:
        """The pool of a width with all of these factors in it."""
        width = factors[0][1].width
        pool = self._pools.get((width, bits))
        missing = {key: f for key, f in factors if pool is None or key not in pool.first}
        if not missing and pool is not None:
            return pool
        rows = sum(f.codes.shape[0] * f.rank for f in missing.values())
        if pool is None or pool.used + rows > pool.capacity:
            pool = self._grow(pool, rows, width, bits, {key: f for key, f in factors if key not in missing})
            missing = {key: f for key, f in factors if key not in pool.first}
        for key, factor in missing.items():
            self._place(pool, key, factor, bits)
        return pool

    def _grow(
        self, old: _Pool | None, rows: int, width: int, bits: Bits, in_use: Mapping[str, QuantizedFactor]
    ) -> _Pool:
        """A larger pool with the old one's rows in it, or an empty one where that would exceed the limit."""
        used = 0 if old is None else old.used
        capacity = max(_FEWEST_ROWS, 2 * used, used + rows)
        others = sum(_row_bytes(*key) * p.capacity for key, p in self._pools.items() if key != (width, bits))
        if others + capacity * _row_bytes(width, bits) > self._limit:
            self._pools.clear()
            old, used = None, 0
            capacity = max(_FEWEST_ROWS, rows + sum(f.codes.shape[0] * f.rank for f in in_use.values()))
        codes = self._device.empty((capacity, width * bits // 8), np.uint8)
        scales = self._device.empty((capacity, width // RESIDENT_BLOCK))
        if old is not None:
            self._copy(old.codes, codes.data_ptr())
            self._copy(old.scales, scales.data_ptr())
        pool = _Pool(codes, scales, capacity, used, {} if old is None else dict(old.first))
        self._pools[width, bits] = pool
        return pool

    def _place(self, pool: _Pool, key: str, factor: QuantizedFactor, bits: Bits) -> None:
        codes = resident_codes(factor, bits)
        scales = factor.scales.astype(np.float32).reshape(len(codes), -1) * np.float32(factor.gain)
        self._copy(self._device.place(codes), pool.codes.data_ptr() + pool.used * codes.shape[1])
        self._copy(self._device.place(scales), pool.scales.data_ptr() + 4 * pool.used * scales.shape[1])
        pool.first[key] = pool.used
        pool.used += len(codes)

    def _counting(self, rows: int) -> View:
        """0, 1, 2, ..., rows - 1 on the device."""
        if self._order.shape()[0] < rows:
            self._order = self._device.place(np.arange(2 * rows, dtype=np.int32))
        return View(self._order, self._order.data_ptr(), (rows,), np.int32)


def resident_codes(factor: QuantizedFactor, bits: Bits) -> Bytes:
    """Codes as GatherBlockQuantized reads them: (L r, n) for 8 bits, (L r, n/2) for 4, element 2 j in the low nibble.

    Args:
        bits: 8 takes factors of 4 bits too; the values stay the same.
    """
    codes = unpack(factor).reshape(-1, factor.width)
    if bits == 8:
        return np.asarray(codes + np.uint8((1 << 7) - factor.zero_point), np.uint8)
    return np.asarray(codes[:, 0::2] | (codes[:, 1::2] << 4), np.uint8)


def _half_form(factor: QuantizedFactor) -> QuantizedFactor:
    """A factor of any bits in float16, for blends of adapters that are kept in different bits."""
    return factor if factor.bits == 16 else quantize(dequantize(factor), 16)


def _row_bytes(width: int, bits: int) -> int:
    return width * bits // 8 + 4 * (width // RESIDENT_BLOCK)


def _gains(sides: Sequence[tuple[QuantizedFactor, Float]], layers: slice, *, stacked: bool, own: bool) -> Float:
    """What each row's values are multiplied by, (rows, 1): its weight when stacked, and the factor's gain if `own`."""
    gains = np.array([factor.gain if own else 1.0 for factor, _ in sides], np.float32)
    ranks = [factor.rank for factor, _ in sides]
    if not stacked:
        return np.repeat(gains, (layers.stop - layers.start) * ranks[0]).reshape(-1, 1)
    weighted = np.stack([weight[layers] for _, weight in sides], axis=1) * gains
    return np.asarray(np.repeat(weighted, ranks, axis=1), np.float32).reshape(-1, 1)
