"""The factors of several blends side by side, so that each sequence of a pass meets its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgecompose.bundle.specs import SlotGroup
from edgecompose.engine.device import Device, IOBinding, OrtValue
from edgecompose.engine.memory import aligned, copy_memory
from edgecompose.engine.merged import SIDES, MergedAdapter, Side
from edgecompose.engine.slots import slot_name

#: Ranks are padded with zeros to a multiple of so many: what the kernels make of a rank then does not depend on how
#: many more rows of zeros follow it.
RANK_STEP = 8


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the factors of one layer lie: (capacity, rank, width) from an offset in values on."""

    offset: int
    rank: int
    width: int


class BlendRows:
    """Copies of the factors of blends, of one rank for each module, in one buffer.

    Attributes:
        version: changes when the places do, so that what is bound to them has to be bound again.
    """

    def __init__(self, groups: Sequence[SlotGroup], device: Device) -> None:
        self._groups = {group.name: group for group in groups}
        self._device = device
        self._places: dict[tuple[int, str, Side], _Place] = {}
        self._ranks: dict[str, int] = {}
        self._blends: list[MergedAdapter | None] = []
        self._buffer: OrtValue = None
        self._zeros: OrtValue = None
        self.version = 0

    @property
    def bytes(self) -> int:
        """Size of the buffer."""
        return 0 if self._buffer is None else 4 * int(self._buffer.shape()[0])

    def place(self, blends: Sequence[MergedAdapter], *, expected: int = 1) -> None:
        """Have the factors of these blends in these rows; those that are there already are not copied again.

        Args:
            expected: how many there are likely to be soon: room for more of them is made anew, which takes ten times as
                long as to copy one.
        """
        ranks = padded_ranks(blends)
        fits = self._ranks.keys() == ranks.keys() and all(r <= self._ranks[m] <= 2 * r for m, r in ranks.items())
        if not fits or len(blends) > len(self._blends):
            self._lay_out(ranks, max(len(blends), expected))
        for row, blend in enumerate(blends):
            held = self._blends[row]
            if held is None or held.digest != blend.digest:
                self._copy(row, blend)
                self._blends[row] = blend

    def bind(self, binding: IOBinding, rows: int) -> None:
        """Bind the first `rows` blends to the slots of a graph."""
        memory, kind = 0 if self._buffer is None else self._buffer.data_ptr(), self._device.kind
        for (layer, module, side), place in self._places.items():
            shape = (rows, 1, place.rank, place.width)
            binding.bind_input(slot_name(layer, module, side), kind, 0, np.float32, shape, memory + 4 * place.offset)

    def clear(self) -> None:
        """Give the memory back."""
        self._places, self._ranks, self._blends = {}, {}, []
        self._buffer = self._zeros = None
        self.version += 1

    def _lay_out(self, ranks: Mapping[str, int], capacity: int) -> None:
        self.clear()
        end, most = 0, 0
        for module, rank in ranks.items():
            group = self._groups[module]
            for layer in range(group.layers):
                for side, width in zip(SIDES, (group.n_in, group.n_out), strict=True):
                    self._places[layer, module, side] = _Place(end, rank, width)
                    end += aligned(capacity * rank * width)
                    most = max(most, rank * width)
        self._ranks, self._blends = dict(ranks), [None] * capacity
        if end:
            self._buffer = self._device.buffer(end)
            self._zeros = self._device.place(np.zeros(most, np.float32))

    def _copy(self, row: int, blend: MergedAdapter) -> None:
        for (layer, module, side), place in self._places.items():
            target = self._buffer.data_ptr() + 4 * (place.offset + row * place.rank * place.width)
            used = 0
            if module in blend.modules and layer < blend.modules[module].layers:
                source, shape = blend.address(module, side, layer)
                used = math.prod(shape)
                copy_memory(self._device, source, target, size=4 * used)
            rest = place.rank * place.width - used
            if rest:
                copy_memory(self._device, self._zeros.data_ptr(), target + 4 * used, size=4 * rest)


def padded_ranks(blends: Sequence[MergedAdapter]) -> dict[str, int]:
    """The rank that holds the rows of all blends, by module."""
    ranks: dict[str, int] = {}
    for blend in blends:
        for name, module in blend.modules.items():
            ranks[name] = max(ranks.get(name, 0), -(-module.rank // RANK_STEP) * RANK_STEP)
    return ranks


def is_padded(blend: MergedAdapter) -> bool:
    """Whether a blend's own factors have padded ranks, so that they can be bound where they lie."""
    return all(module.rank % RANK_STEP == 0 for module in blend.modules.values())
