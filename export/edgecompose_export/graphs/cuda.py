"""A decoder graph for CUDA: attention in float16, everything else in the types of the original graph.

ONNX Runtime's attention with a key-value cache (GroupQueryAttention) has CUDA kernels for float16 and bfloat16 only. In
the float32 graph it would run on the CPU, and queries, keys and values would be copied there and back in every layer.
So queries, keys, values and the rotary tables are cast to float16, the caches are float16, and the result is cast back.
Weights stay in the data file of the decoder beside it.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from edgecompose.errors import ExportError

#: Inputs of GroupQueryAttention that have the element type of its result: query (or packed qkv), key, value, past key
#: and value, cosines, sines, attention bias, head sink.
_FLOATS = (0, 1, 2, 3, 4, 7, 8, 10, 11)


def write_cuda_graph(graph: Path) -> str:
    """Write `<name>_cuda.onnx` beside a decoder graph, with its inputs and outputs but for float16 caches.

    Args:
        graph: a saved decoder, with slots or for fused weights.

    Returns:
        The name of the new file.

    Raises:
        ExportError: the graph has no attention node that can be converted.
    """
    model = onnx.load(graph, load_external_data=False)
    narrow_attention(model.graph)
    target = graph.with_name(f"{graph.stem}_cuda.onnx")
    target.write_bytes(model.SerializeToString())
    return target.name


def narrow_attention(graph: onnx.GraphProto) -> None:
    """Make attention compute in float16, in place."""
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attention:
        raise ExportError("the decoder graph has no GroupQueryAttention node; this architecture is not supported")
    narrow: dict[str, onnx.NodeProto] = {}
    caches: set[str] = set()
    widen: dict[str, onnx.NodeProto] = {}
    inputs = {value.name for value in graph.input}
    for node in attention:
        for place in _FLOATS:
            name = node.input[place] if place < len(node.input) else ""
            if name in inputs:
                caches.add(name)
            elif name:
                narrow.setdefault(name, _cast(name, f"{name}/half", TensorProto.FLOAT16))
                node.input[place] = f"{name}/half"
        caches |= set(node.output[1:3])
        result = node.output[0]
        node.output[0] = f"{result}/half"
        widen[node.name] = _cast(f"{result}/half", result, TensorProto.FLOAT)
    for value in (*graph.input, *graph.output):
        if value.name in caches:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    _insert(graph, narrow, widen)


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=to)


def _insert(graph: onnx.GraphProto, narrow: dict[str, onnx.NodeProto], widen: dict[str, onnx.NodeProto]) -> None:
    """Insert each cast after the node whose output it reads; casts of stored tensors come first."""
    outputs = {name for node in graph.node for name in node.output}
    ordered = [cast for name, cast in narrow.items() if name not in outputs]
    for node in graph.node:
        ordered.append(node)
        ordered += [narrow[name] for name in node.output if name in narrow]
        ordered += [widen[node.name]] if node.name in widen else []
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)
