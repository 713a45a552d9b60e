"""Checks the inputs and outputs of a base's graphs against the manifest, and binds a blend to their slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import SlotGroup
from edgecompose.engine.device import Device, IOBinding, Session
from edgecompose.engine.merged import SIDES, MergedAdapter, Side
from edgecompose.errors import BundleError

#: Name of an input or output -> the axes whose size is known.
Axes = Mapping[str, Mapping[int, int]]


def slot_name(layer: int, module: str, side: Side) -> str:
    """Name of the graph's input for one factor of one linear module."""
    return f"layers.{layer}.{module}.{side}"


def slot_tensors(adapter: MergedAdapter) -> dict[str, npt.NDArray[np.float32]]:
    """A blend's factors on the host, (1, 1, R, n_in) or (1, 1, R, n_out), by the decoder's slots that they are for."""
    return {
        slot_name(layer, name, side): factor[None, None, layer]
        for name, factors in adapter.factors().items()
        for side, factor in zip(SIDES, factors, strict=True)
        for layer in range(len(factor))
    }


def slot_axes(groups: Sequence[SlotGroup], *, axis: int) -> dict[str, dict[int, int]]:
    """Every slot of a graph, for any rank r: A is (..., r, n_in), B is (..., r, n_out).

    Args:
        axis: that of n_in and n_out: 1 where the graph takes one blend, 3 where it takes several.
    """
    return {
        slot_name(layer, group.name, side): {axis: width}
        for group in groups
        for layer in range(group.layers)
        for side, width in zip(SIDES, (group.n_in, group.n_out), strict=True)
    }


def bind_slots(binding: IOBinding, adapter: MergedAdapter, device: Device, *, leading: tuple[int, ...] = ()) -> None:
    """Bind each layer's slots to their places in the blend's buffer, without a copy.

    Args:
        leading: axes of size 1 before those of rank and width.
    """
    if not adapter.modules:
        return
    memory = adapter.buffer.data_ptr()
    for name, module in adapter.modules.items():
        for side in SIDES:
            offset, (layers, rank, width) = module.place(side)
            for layer in range(layers):
                address, shape = memory + 4 * (offset + layer * rank * width), (*leading, rank, width)
                binding.bind_input(slot_name(layer, name, side), device.kind, 0, np.float32, shape, address)


def check_graph(session: Session, name: str, inputs: Axes, outputs: Axes) -> None:
    """Compare a graph with its description: ONNX Runtime would fail in its own words, at the first prompt.

    Args:
        name: what the graph is, for the message.
        inputs: all that it must take, no more and no less.
        outputs: those that it must give.

    Raises:
        BundleError: a name is missing or left over, or an axis has another size.
    """
    taken = {v.name: v.shape for v in (*session.get_inputs(), *session.get_overridable_initializers())}
    returned = {v.name: v.shape for v in session.get_outputs()}
    wrong = sorted((set(taken) ^ set(inputs)) | (set(outputs) - set(returned)))
    for actual, expected in ((taken, inputs), (returned, outputs)):
        wrong += [n for n, axes in expected.items() if n in actual and not _fits(actual[n], axes)]
    if wrong:
        shown = ", ".join(wrong[:4]) + (" ..." if len(wrong) > 4 else "")
        raise BundleError(f"the {name} graph is not the one that the manifest describes: {shown}; export it again")


def _fits(shape: Sequence[int | str], axes: Mapping[int, int]) -> bool:
    return all(axis < len(shape) and shape[axis] == size for axis, size in axes.items())
