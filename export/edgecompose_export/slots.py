"""Adapter slots in a decoder graph, and the inputs that our decoding loop feeds.

Works on graphs of onnxruntime-genai's model builder. Every linear module that a LoRA adapter may
target gets two optional inputs, `layers.<i>.<module>.A` (r, in) and `layers.<i>.<module>.B` (r, out),
whose default values have rank 0: nothing fed means the base alone, stacked ranks mean a blend.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgecompose.decoder_modules import PACKED
from edgecompose.errors import ExportError
from edgecompose.manifest import SlotGroup

_LINEAR = re.compile(r"^/model/layers\.(\d+)/(?:attn|mlp)/(\w+_proj)/MatMul(?:_\w+)?$")
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear node of the graph: its layer, its name, and its weight's (in, out)."""

    node: onnx.NodeProto
    layer: int
    module: str
    n_in: int
    n_out: int


def find_linears(graph: onnx.GraphProto) -> list[Linear]:
    """All float MatMul nodes of the decoder's blocks, in graph order."""
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    found = []
    for node in graph.node:
        named = _LINEAR.match(node.name)
        if node.op_type == "MatMul" and named and len(shapes.get(node.input[1], ())) == 2:
            n_in, n_out = shapes[node.input[1]]
            found.append(Linear(node, int(named[1]), named[2], n_in, n_out))
    return found


def add_slots(model: onnx.ModelProto, head_sizes: tuple[int, int]) -> tuple[SlotGroup, ...]:
    """Add the slots of every linear node, in place; return them grouped by module.

    Args:
        model: a float graph of the builder (quantise afterwards: the slots are left alone).
        head_sizes: output width of the query and of the key projection, for a packed qkv.

    Raises:
        ExportError: no linear node found, or a module whose shape differs between layers.
    """
    graph = model.graph
    linears = find_linears(graph)
    if not linears:
        raise ExportError("the decoder graph has no linear node under /model/layers; is it a builder graph?")
    shapes: dict[str, dict[int, tuple[int, int]]] = {}
    insertions: list[tuple[onnx.NodeProto, list[onnx.NodeProto]]] = []
    for linear in linears:
        parts = slot_parts(linear, head_sizes)
        for module, n_out in parts:
            shapes.setdefault(module, {})[linear.layer] = (linear.n_in, n_out)
        insertions.append((linear.node, _slot_nodes(graph, linear, parts)))
    _insert_after(graph, insertions)
    return tuple(_group(module, shapes[module]) for module in _MODULES if module in shapes)


def feed_lengths(graph: onnx.GraphProto) -> None:
    """Replace the attention mask by the two numbers that attention wants, in place.

    `seqlens_k` (batch,) int32 is the total length minus one, `total_sequence_length` () int32 the
    length of the longest row. Both keep their shape from step to step, so they are bound once.
    """
    attention = [n for n in graph.node if n.op_type == "GroupQueryAttention"]
    if not attention:
        raise ExportError("the decoder graph has no GroupQueryAttention node; this architecture is not supported")
    if any(i.name == "position_ids" for i in graph.input):
        raise ExportError("the decoder graph wants position_ids (rotary outside attention); not supported")
    for node in attention:
        node.input[5], node.input[6] = "seqlens_k", "total_sequence_length"
    kept = [i for i in graph.input if i.name != "attention_mask"]
    del graph.input[:]
    graph.input.extend(kept)
    graph.input.append(helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch_size"]))
    graph.input.append(helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []))
    _drop_unused(graph)


def output_layer(graph: onnx.GraphProto) -> onnx.NodeProto:
    """The linear node that the logits come from, behind any scaling of them."""
    producer = {o: n for n in graph.node for o in n.output}
    head = producer["logits"]
    while head.op_type not in ("MatMul", "MatMulNBits"):
        if head.input[0] not in producer:
            raise ExportError("the decoder graph has no linear output layer; this architecture is not supported")
        head = producer[head.input[0]]
    return head


def keep_last_logits(graph: onnx.GraphProto) -> None:
    """Let the output layer see the last `logits_kept` positions only (default 1), in place."""
    head = output_layer(graph)
    for name, value in (("num_logits.axis", [1]), ("num_logits.end", [np.iinfo(np.int64).max])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "logits_kept"))
    graph.input.append(helper.make_tensor_value_info("logits_kept", TensorProto.INT64, [1]))
    negate = helper.make_node("Neg", ["logits_kept"], ["num_logits.start"], "num_logits/Neg")
    cut = helper.make_node(
        "Slice", [head.input[0], "num_logits.start", "num_logits.end", "num_logits.axis"],
        ["num_logits.hidden"], "num_logits/Slice",
    )  # fmt: skip
    head.input[0] = "num_logits.hidden"
    position = list(graph.node).index(head)
    graph.node.insert(position, cut)
    graph.node.insert(position, negate)


def slot_parts(linear: Linear, head_sizes: tuple[int, int]) -> list[tuple[str, int]]:
    """The modules that a linear node computes, and their output widths: one, or those that it packs.

    Args:
        head_sizes: output width of the query and of the key projection, for a packed qkv.

    Raises:
        ExportError: widths that do not sum to the node's.
    """
    query, key = head_sizes
    widths = {"qkv_proj": (query, key, key), "gate_up_proj": (linear.n_out // 2,) * 2}
    if linear.module in PACKED:
        parts = list(zip(PACKED[linear.module], widths[linear.module], strict=True))
    else:
        parts = [(linear.module, linear.n_out)]
    if sum(width for _, width in parts) != linear.n_out:
        raise ExportError(f"'{linear.node.name}' is {linear.n_out} wide, its parts are {parts}")
    return parts


def _slot_nodes(graph: onnx.GraphProto, linear: Linear, parts: list[tuple[str, int]]) -> list[onnx.NodeProto]:
    """Nodes that add x A B to the output of one linear node, which is renamed."""
    source, target = linear.node.input[0], linear.node.output[0]
    linear.node.output[0] = f"{target}/base"
    nodes, deltas = [], []
    for module, n_out in parts:
        slot = f"layers.{linear.layer}.{module}"
        _optional_input(graph, f"{slot}.A", (0, linear.n_in), [f"{module}_rank", linear.n_in])
        _optional_input(graph, f"{slot}.B", (0, n_out), [f"{module}_rank", n_out])
        nodes.append(
            helper.make_node(
                "FusedMatMul", [source, f"{slot}.A"], [f"{slot}/down"], f"{slot}/A", domain="com.microsoft", transB=1
            )
        )
        nodes.append(helper.make_node("MatMul", [f"{slot}/down", f"{slot}.B"], [f"{slot}/up"], f"{slot}/B"))
        deltas.append(f"{slot}/up")
    delta = deltas[0]
    if len(deltas) > 1:
        delta = f"{target}/delta"
        nodes.append(helper.make_node("Concat", deltas, [delta], f"{linear.node.name}/Concat", axis=-1))
    nodes.append(helper.make_node("Add", [f"{target}/base", delta], [target], f"{linear.node.name}/Add"))
    return nodes


def _optional_input(graph: onnx.GraphProto, name: str, shape: tuple[int, int], dims: list[int | str]) -> None:
    graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))


def _insert_after(graph: onnx.GraphProto, insertions: list[tuple[onnx.NodeProto, list[onnx.NodeProto]]]) -> None:
    following = {node.name: nodes for node, nodes in insertions}
    ordered = [n for node in graph.node for n in (node, *following.get(node.name, ()))]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in ordered]
    del graph.node[:]
    graph.node.extend(copies)


def _group(module: str, shapes: dict[int, tuple[int, int]]) -> SlotGroup:
    layers, sizes = sorted(shapes), set(shapes.values())
    if len(sizes) != 1 or layers != list(range(len(layers))):
        raise ExportError(f"'{module}' is not of one shape in every layer ({sorted(sizes)}); not supported")
    ((n_in, n_out),) = sizes
    return SlotGroup(module, len(layers), n_in, n_out)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes whose outputs nobody reads (the subgraph that reformatted the mask)."""
    while True:
        read = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}
        unused = [n for n in graph.node if not any(o in read for o in n.output)]
        if not unused:
            return
        for node in unused:
            graph.node.remove(node)
