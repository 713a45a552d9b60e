"""The ONNX graphs that merge quantised factors; they depend on no model and ship with the runtime.

One graph for each (method, factor, bits). A factor comes in rank-major, (R, L, n), the adapters one after
another; A goes out as (L, n, R), B as (L, R, n), ready to be bound to the slots layer by layer.
`edgecompose-export merge-graphs` writes them to `edgecompose/graphs/`; a test compares them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

METHODS = ("product", "linear", "magnitude_prune", "ties_total", "ties_frequency")
_OPSET = [helper.make_opsetid("", 21)]


class _Builder:
    """Collects nodes; each call returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: list[int] | float, dtype: type[np.generic] = np.int64) -> str:
        if all(t.name != name for t in self.constants):
            self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def __call__(self, op: str, *inputs: str, out: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [out], out, **attributes))
        return out


def build_merge_graph(method: str, factor: str, bits: int) -> onnx.ModelProto:
    """The graph of one method.

    Args:
        method: one of METHODS. `product` stacks; the others act on the factors of K adapters of one rank.
        factor: 'A' or 'B'.
        bits: 4 or 8.

    Inputs: `codes` (R, L, n or n/2), `scales` (R, L, blocks) float16, `gains` (R, 1) float32;
    `weights` (R, L) for product, (K, L) otherwise; `kept` (1,) int64, entries a tensor that survive the prune.
    """
    b = _Builder()
    if method == "product":
        values = _dequantize(b, bits, rows="weights")
        merged = values  # (R, L, n): stacked components
    else:
        values = _split(b, _dequantize(b, bits))  # (K, r, L, n)
        merged = _paper(b, method, values)
    permutation = [1, 2, 0] if factor == "A" else [1, 0, 2]
    b("Transpose", merged, out="merged", perm=permutation)
    return _model(b, method, factor, bits)


def _dequantize(b: _Builder, bits: int, rows: str | None = None) -> str:
    """Values (R, L, n) = code * scale * gain (* row weight)."""
    scales = b("Mul", b("Cast", "scales", out="scales32", to=TensorProto.FLOAT), _row(b, "gains"), out="scaled")
    if rows is not None:
        axis = b.constant("last", [-1])
        scales = b("Mul", scales, b("Unsqueeze", rows, axis, out="rows"), out="weighted_scales")
    shape = b("Concat", b("Shape", "scales", out="scales_shape"), b.constant("rest", [-1]), out="blocked", axis=0)
    blocks = b("Reshape", "codes", shape, out="codes_blocked")
    if bits == 8:
        numbers = b("Cast", blocks, out="numbers", to=TensorProto.FLOAT)
    else:
        low = b("BitwiseAnd", blocks, b.constant("nibble", 15, np.uint8), out="low")
        high = b("BitShift", blocks, b.constant("four", 4, np.uint8), out="high", direction="RIGHT")
        raised = b("Cast", b("Concat", low, high, out="both", axis=-1), out="raised", to=TensorProto.FLOAT)
        numbers = b("Sub", raised, b.constant("eight", 8, np.float32), out="numbers")
    scale = b("Unsqueeze", scales, b.constant("last", [-1]), out="block_scales")
    values = b("Mul", numbers, scale, out="block_values")
    return b("Reshape", values, b.constant("flat", [0, 0, -1]), out="values")


def _row(b: _Builder, name: str) -> str:
    return b("Unsqueeze", name, b.constant("last", [-1]), out=f"{name}_rows")


def _split(b: _Builder, values: str) -> str:
    """(R, L, n) -> (K, r, L, n)."""
    shape = b("Shape", values, out="values_shape", start=1)
    count = b("Shape", "weights", out="count", end=1)
    return b("Reshape", values, b("Concat", count, b.constant("rest", [-1]), shape, out="split", axis=0), out="stack")


def _paper(b: _Builder, method: str, stack: str) -> str:
    """PEFT's factor-wise methods: (K, r, L, n) and weights (K, L) -> (r, L, n)."""
    if method != "linear":
        stack = _prune(b, stack)
    axes = b.constant("around_layers", [1, 3])
    weighted = b("Mul", stack, b("Unsqueeze", "weights", axes, out="adapter_weights"), out="weighted")
    first = b.constant("first", [0])
    if not method.startswith("ties"):
        return b("ReduceSum", weighted, first, out="sum", keepdims=0)
    signs = b("Sign", stack, out="signs")
    voters = stack if method == "ties_total" else signs
    total = b("ReduceSum", voters, first, out="votes", keepdims=1)
    positive = b("GreaterOrEqual", total, b.constant("zero", 0.0, np.float32), out="positive")
    one, minus = b.constant("one", 1.0, np.float32), b.constant("minus", -1.0, np.float32)
    elected = b("Where", positive, one, minus, out="elected")
    mask = b("Cast", b("Equal", signs, elected, out="agree"), out="mask", to=TensorProto.FLOAT)
    total = b("ReduceSum", b("Mul", weighted, mask, out="kept_values"), first, out="kept_sum", keepdims=0)
    count = b("Max", b("ReduceSum", mask, first, out="kept_count", keepdims=0), one, out="divisor")
    return b("Div", total, count, out="disjoint_mean")


def _prune(b: _Builder, stack: str) -> str:
    """Zero all but the `kept` largest magnitudes of each adapter's factor in each layer."""
    by_layer = b("Transpose", stack, out="by_layer", perm=[0, 2, 1, 3])  # (K, L, r, n)
    flat = b("Reshape", by_layer, b.constant("flat", [0, 0, -1]), out="flat_layers")
    b.nodes.append(
        helper.make_node(
            "TopK", [b("Abs", flat, out="magnitudes"), "kept"], ["top", "places"], "TopK", axis=-1, sorted=0
        )
    )
    ones = b("Expand", b.constant("one", 1.0, np.float32), b("Shape", "places", out="places_shape"), out="ones")
    zeros = b("Mul", flat, b.constant("zero", 0.0, np.float32), out="zeros")
    mask = b("ScatterElements", zeros, "places", ones, out="survivors", axis=-1)
    pruned = b("Mul", flat, mask, out="pruned_flat")
    restored = b("Reshape", pruned, b("Shape", by_layer, out="by_layer_shape"), out="pruned_layers")
    return b("Transpose", restored, out="pruned", perm=[0, 2, 1, 3])


def _model(b: _Builder, method: str, factor: str, bits: int) -> onnx.ModelProto:
    codes = TensorProto.INT8 if bits == 8 else TensorProto.UINT8
    rows = "R" if method == "product" else "K"
    inputs = [
        helper.make_tensor_value_info("codes", codes, ["R", "L", "packed"]),
        helper.make_tensor_value_info("scales", TensorProto.FLOAT16, ["R", "L", "blocks"]),
        helper.make_tensor_value_info("gains", TensorProto.FLOAT, ["R", 1]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, [rows, "L"]),
    ]
    if method not in ("product", "linear"):
        inputs.append(helper.make_tensor_value_info("kept", TensorProto.INT64, [1]))
    shape = ["L", "n", "rank"] if factor == "A" else ["L", "rank", "n"]
    output = helper.make_tensor_value_info("merged", TensorProto.FLOAT, shape)
    graph = helper.make_graph(b.nodes, f"{method}_{factor}_int{bits}", inputs, [output], b.constants)
    model = helper.make_model(graph, opset_imports=_OPSET, ir_version=10, producer_name="edgecompose")
    onnx.checker.check_model(model, full_check=True)
    return model


def build_probe() -> onnx.ModelProto:
    """One node, to learn whether a provider can be opened."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"], "Add")], "probe", [value], [out])
    return helper.make_model(graph, opset_imports=_OPSET, ir_version=10, producer_name="edgecompose")


def all_graphs() -> dict[str, bytes]:
    """File name and bytes of every graph that the runtime ships."""
    graphs = {
        f"{method}.{factor}.int{bits}.onnx": build_merge_graph(method, factor, bits)
        for method in METHODS for factor in "AB" for bits in (4, 8)
    }  # fmt: skip
    graphs["probe.onnx"] = build_probe()
    return {name: bytes(graph.SerializeToString(deterministic=True)) for name, graph in graphs.items()}


def write_graphs(folder: Path) -> list[Path]:
    """Write every graph into `folder`; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in all_graphs().items():
        (folder / name).write_bytes(content)
        paths.append(folder / name)
    return paths
