"""The graphs that fuse a blend into a float base: one fuses the weights, one decodes with the fused weights.

Both read the tensors of `decoder.onnx` in the data file beside it, so that no weight is stored twice.

A fused weight is stored as panels of 32 columns, (n_out / 32, n_in, 32). ONNX Runtime repacks constant weights when it
loads a graph, but never weights that are fed as inputs: a product of one row with an (in, out) matrix then strides over
memory and takes up to twice the time. One core reads a panel from its first byte to its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto, numpy_helper

from edgecompose.bundle.specs import FusingSpec
from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.graphs.block import INPUT_GROUPS
from edgecompose_export.graphs.decoder import write_decoder
from edgecompose_export.graphs.stored_weights import StoredWeights
from edgecompose_export.graphs.writer import MICROSOFT, GraphWriter

FUSE_GRAPH, DECODER_GRAPH = "fuse.onnx", "decoder_fused.onnx"
#: Columns of a panel; a weight whose width is not a multiple of it is one panel.
PANEL = 32


def write_fuse_graphs(config: DecoderConfig, stored: StoredWeights, folder: Path) -> FusingSpec:
    """Write `fuse.onnx` and `decoder_fused.onnx` into the folder of a float decoder.

    Args:
        stored: the weights of that decoder, all of them float.
    """
    graph = GraphWriter("fuse")
    weights: dict[str, tuple[int, ...]] = {}
    for layer in range(len(config.layers)):
        for modules in INPUT_GROUPS:
            for group in stored.groups(layer, modules):
                weights[_weight(layer, group)] = _panels(config, group)
                _fuse(graph, config, stored, layer=layer, group=group)
    graph.save(folder / FUSE_GRAPH)
    write_decoder(config, _FusedWeights(config, stored), slots=False).save(folder / DECODER_GRAPH)
    return FusingSpec(FUSE_GRAPH, DECODER_GRAPH, weights)


class _FusedWeights:
    """As `Weights`: linear modules read panels that are inputs; everything else comes from the data file."""

    def __init__(self, config: DecoderConfig, stored: StoredWeights) -> None:
        self._config, self._stored = config, stored
        self.embed, self.head = stored.embed, stored.head
        self.parameter, self.groups = stored.parameter, stored.groups

    def product(self, graph: GraphWriter, layer: int, modules: Sequence[str], *, source: str, target: str) -> str:
        group, width = tuple(modules), sum(self._config.widths[module][0] for module in modules)
        panels = graph.input(_weight(layer, group), TensorProto.FLOAT, _panels(self._config, group))
        product = graph.node("MatMul", [source, panels], f"{target}/panels")  # (panels, s, columns), batch 1
        rows = graph.node("Transpose", [product], f"{target}/rows", perm=[1, 0, 2])
        bias = self._stored.bias(layer, modules)
        plain = target if bias is None else f"{target}/unbiased"
        graph.node("Reshape", [rows, graph.constant([1, -1, width])], plain)
        if bias is None:
            return target
        return graph.node("Add", [plain, graph.tensor(numpy_helper.from_array(bias, f"{target}.bias"))], target)


def _fuse(
    graph: GraphWriter, config: DecoderConfig, stored: StoredWeights, *, layer: int, group: tuple[str, ...]
) -> None:
    """Nodes that compute W + B^T A of one product in panels; several modules are concatenated."""
    fused = _weight(layer, group)
    weight = stored.matrix(graph, layer, group)
    updates = []
    for module in group:
        n_out, n_in = config.widths[module]
        slot = f"layers.{layer}.{module}"
        for side, width in (("A", n_in), ("B", n_out)):
            name = graph.input(f"{slot}.{side}", TensorProto.FLOAT, [f"{module}_rank", width])
            graph.tensor(numpy_helper.from_array(np.zeros((0, width), np.float32), name))
        updates.append(
            graph.node("FusedMatMul", [f"{slot}.B", f"{slot}.A"], f"{slot}/update", domain=MICROSOFT, transA=1)
        )
    update = updates[0] if len(updates) == 1 else graph.node("Concat", updates, f"{fused}/update", axis=0)
    matrix = graph.node("Add", [weight, update], f"{fused}/matrix")
    count, n_in, width = _panels(config, group)
    columns = graph.node("Reshape", [matrix, graph.constant([count, width, n_in])], f"{fused}/columns")
    graph.node("Transpose", [columns], fused, perm=[0, 2, 1])
    graph.output(fused, TensorProto.FLOAT, [count, n_in, width])


def _weight(layer: int, group: Sequence[str]) -> str:
    """Name of a fused weight: an output of one graph, an input of the other."""
    return f"layers.{layer}.{'+'.join(group)}.weight"


def _panels(config: DecoderConfig, group: Sequence[str]) -> tuple[int, int, int]:
    """Shape of a fused weight: number of panels, n_in, columns of a panel."""
    n_out, n_in = sum(config.widths[module][0] for module in group), config.widths[group[0]][1]
    width = n_out if n_out % PANEL else PANEL
    return n_out // width, n_in, width
