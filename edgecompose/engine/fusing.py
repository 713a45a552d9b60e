"""Writes a blend into a copy of a float base's weights, on the device.

W + A^T B goes to memory of its own and the stored W is only read. Taking a blend out again is to stop using the copy:
nothing is subtracted, so the base keeps its bits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecompose.bundle.specs import BaseSpec, FusingSpec
from edgecompose.engine.device import Device, IOBinding, OrtValue, open_session, run_bound
from edgecompose.engine.memory import BufferPool, aligned
from edgecompose.engine.merged import MergedAdapter
from edgecompose.engine.slots import bind_slots, check_graph, slot_axes
from edgecompose.errors import GenerationError


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class FusedWeights:
    """A base's linear weights with a blend in them, float32, in one buffer on the device that it alone owns.

    `digest` names the blend's content; `places` are the weights: name -> (offset in values, shape).
    """

    digest: str
    places: Mapping[str, tuple[int, tuple[int, ...]]]
    buffer: OrtValue

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return sum(4 * math.prod(shape) for _, shape in self.places.values())

    def bind_inputs(self, binding: IOBinding, device: Device) -> None:
        """Let a session read the weights where they lie."""
        for name, (offset, shape) in self.places.items():
            binding.bind_input(name, device.kind, 0, np.float32, list(shape), self.buffer.data_ptr() + 4 * offset)


class Fuser:
    """The session of a bundle's fuse graph. Holds no blend; safe between threads."""

    def __init__(self, graph: Path, spec: BaseSpec, device: Device) -> None:
        self._device = device
        self._session = open_session(graph, device, name="fuse")
        weights = require_fusing(spec).weights
        check_graph(self._session, "fuse", slot_axes(spec.slots, axis=1), weight_axes(weights))
        self._places, self._values = _lay_out(weights)
        # the memory of one fused base is kept for the next: fresh pages cost more than fusing does
        self._pool = BufferPool(device, idle_bytes=4 * self._values)

    def fuse(self, adapter: MergedAdapter) -> FusedWeights:
        """The base's weights with a blend in them: W + A^T B of every linear module, products and sum in float32."""
        buffer = self._pool.take(self._values)
        fused = FusedWeights(adapter.digest, self._places, buffer)
        weakref.finalize(fused, self._pool.give, buffer).atexit = False
        binding = self._session.io_binding()
        bind_slots(binding, adapter, self._device)
        for name, (offset, shape) in self._places.items():
            address = buffer.data_ptr() + 4 * offset
            binding.bind_output(name, self._device.kind, 0, np.float32, list(shape), address)
        run_bound(self._session, binding, name="fuse")
        binding.synchronize_outputs()
        return fused


def require_fusing(spec: BaseSpec) -> FusingSpec:
    """How a base is fused.

    Raises:
        GenerationError: a quantised base, or a float one that was exported without the graphs.
    """
    if spec.fusing is not None:
        return spec.fusing
    if spec.precision in ("fp32", "fp16"):
        raise GenerationError(
            f"fusing needs the graphs fuse and decoder_fused; this bundle's {spec.precision} base was exported "
            "without them; export base and bundle again, or use attach"
        )
    raise GenerationError(
        f"fusing needs a float base; this bundle's base is {spec.precision}; "
        "export the base with --precision fp32 or fp16, or use attach"
    )


def weight_axes(weights: Mapping[str, tuple[int, ...]]) -> dict[str, dict[int, int]]:
    """Every fused weight, an output of one graph and an input of the other, with the size of each axis."""
    return {name: dict(enumerate(shape)) for name, shape in weights.items()}


def fused_bytes(spec: FusingSpec) -> int:
    """Memory that one fused base takes."""
    return 4 * _lay_out(spec.weights)[1]


def _lay_out(weights: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Where each weight lies in the buffer, and the buffer's size in values."""
    places, end = {}, 0
    for name, shape in weights.items():
        places[name] = (end, shape)
        end += aligned(math.prod(shape))
    return places, end
