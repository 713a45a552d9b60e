"""A blend: merged factors on a device, in one buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgecompose.engine.device import OrtValue
from edgecompose.errors import MergeError

Float = npt.NDArray[np.float32]
Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")


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
    """How a blend differs from the requested sum.

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
        flat, modules = self.buffer.numpy(), {}
        for name, module in self.modules.items():
            parts = (module.place("A"), module.place("B"))
            a, b = (flat[offset : offset + math.prod(shape)].reshape(shape).copy() for offset, shape in parts)
            modules[name] = (a, b)
        return modules


def require_adapters(merged: MergedAdapter) -> None:
    """Refuse to write a blend of nothing.

    Raises:
        MergeError: the blend holds no adapter.
    """
    if not merged.modules:
        raise MergeError("the blend holds no adapter, so there is nothing to write")
