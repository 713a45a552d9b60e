"""The graphs that write a blend into a float base: one folds the weights, one decodes with them.

Both read the tensors of `decoder.onnx` where they lie, in the data file beside it, so that no weight is stored twice.

A folded weight is kept as panels of 32 columns, (n_out / 32, n_in, 32). ONNX Runtime repacks constant weights when it
loads a graph, and weights that are fed as inputs never: a product of one row with an (in, out) matrix then strides over
memory and takes up to twice the time. A panel is read from its first byte to its last, by one core.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgecompose.manifest import FoldingSpec
from edgecompose_export.slots import Linear, find_linears, slot_parts

FOLD_GRAPH, DECODER_GRAPH = "fold.onnx", "decoder_folded.onnx"
#: Columns of a panel; a weight whose width is no multiple of it is one panel.
PANEL = 32
_SHAPE = "folding.shape."


def without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph whose initializers have names, types and shapes but no values."""
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = model.graph
    tensors = [TensorProto(name=t.name, data_type=t.data_type, dims=t.dims) for t in graph.initializer]
    bare.graph.CopyFrom(
        onnx.GraphProto(name=graph.name, node=graph.node, input=graph.input, output=graph.output, initializer=tensors)
    )
    return bare


def write_folding(bare: onnx.ModelProto, decoder: Path, head_sizes: tuple[int, int]) -> FoldingSpec:
    """Write `fold.onnx` and `decoder_folded.onnx` beside a decoder graph of float weights.

    Args:
        bare: the decoder before it got slots, as `without_data` gives it; changed in place.
        decoder: the saved graph with slots, whose tensors the two graphs read.
        head_sizes: output width of the query and of the key projection, for a packed qkv.
    """
    stored = onnx.load(decoder, load_external_data=False).graph
    linears = find_linears(bare.graph)
    spec = FoldingSpec(FOLD_GRAPH, DECODER_GRAPH, {_weight(linear): _panels(linear) for linear in linears})
    fold = onnx.ModelProto(ir_version=bare.ir_version, opset_import=bare.opset_import)
    fold.graph.name = "fold"
    for linear in linears:
        _fold(fold.graph, linear, slot_parts(linear, head_sizes))
    slots = {name for node in fold.graph.node for name in node.input}
    fold.graph.input.extend(i for i in stored.input if i.name in slots)
    for linear in linears:
        _read_panels(bare.graph, linear)
    for model, name in ((fold, FOLD_GRAPH), (bare, DECODER_GRAPH)):
        _read_stored(model.graph, stored)
        (decoder.parent / name).write_bytes(model.SerializeToString())
    return spec


def _fold(graph: onnx.GraphProto, linear: Linear, parts: list[tuple[str, int]]) -> None:
    """Nodes that give W + A^T B of one linear node in panels; the products of a packed one stand side by side."""
    weight, folded = linear.node.input[1], _weight(linear)
    matrix, columns = f"{folded}/matrix", f"{folded}/columns"
    slots = [f"layers.{linear.layer}.{module}" for module, _ in parts]
    if len(slots) == 1:
        factors = [f"{slots[0]}.A", f"{slots[0]}.B", weight]
        graph.node.append(helper.make_node("Gemm", factors, [matrix], f"{folded}/Fold", transA=1))
    else:
        products, update = [f"{slot}/product" for slot in slots], f"{folded}/update"
        for slot, product in zip(slots, products, strict=True):
            factors = [f"{slot}.A", f"{slot}.B"]
            graph.node.append(helper.make_node("Gemm", factors, [product], f"{slot}/Product", transA=1))
        graph.node.append(helper.make_node("Concat", products, [update], f"{folded}/Concat", axis=1))
        graph.node.append(helper.make_node("Add", [weight, update], [matrix], f"{folded}/Fold"))
    count, n_in, width = _panels(linear)
    shape = _constant(graph, [n_in, count, width])
    graph.node.append(helper.make_node("Reshape", [matrix, shape], [columns], f"{folded}/Columns"))
    graph.node.append(helper.make_node("Transpose", [columns], [folded], f"{folded}/Panels", perm=[1, 0, 2]))
    graph.output.append(_value(linear))


def _read_panels(graph: onnx.GraphProto, linear: Linear) -> None:
    """Let a linear node, whose input is (1, s, n_in), read its weight in panels from an input of the graph."""
    node, target = linear.node, linear.node.output[0]
    panels, rows = f"{target}/panels", f"{target}/rows"
    position = list(graph.node).index(node)
    node.input[1], node.output[0] = _weight(linear), panels
    shape = _constant(graph, [1, -1, linear.n_out])
    join = [
        helper.make_node("Transpose", [panels], [rows], f"{node.name}/Rows", perm=[1, 0, 2]),
        helper.make_node("Reshape", [rows, shape], [target], f"{node.name}/Join"),
    ]
    for step, new in enumerate(join, start=1):
        graph.node.insert(position + step, new)
    graph.input.append(_value(linear))


def _read_stored(graph: onnx.GraphProto, stored: onnx.GraphProto) -> None:
    """Give a graph the stored tensors that its nodes read, and the nodes that widen those kept in float16."""
    tensors = {t.name for t in stored.initializer}
    read = {name for node in graph.node for name in node.input}
    made = {name for node in graph.node for name in node.output}
    widened = [
        n for n in stored.node if n.op_type == "Cast" and n.input[0] in tensors and n.output[0] in read - made
    ]  # fmt: skip
    read |= {node.input[0] for node in widened}
    nodes = [*widened, *graph.node]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    own = [t for t in graph.initializer if t.name.startswith(_SHAPE)]
    del graph.initializer[:]
    graph.initializer.extend([*own, *(t for t in stored.initializer if t.name in read)])


def _weight(linear: Linear) -> str:
    """Name of a folded weight: an output of one graph, an input of the other."""
    return f"layers.{linear.layer}.{linear.module}.weight"


def _panels(linear: Linear) -> tuple[int, int, int]:
    """Shape of a folded weight: number of panels, n_in, columns of a panel."""
    width = linear.n_out if linear.n_out % PANEL else PANEL
    return linear.n_out // width, linear.n_in, width


def _value(linear: Linear) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(_weight(linear), TensorProto.FLOAT, _panels(linear))


def _constant(graph: onnx.GraphProto, shape: list[int]) -> str:
    """Name of a shape, kept once in the graph."""
    name = _SHAPE + "x".join(map(str, shape))
    if all(t.name != name for t in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    return name
