"""The ONNX graphs that merge quantised factors; they depend on no model and ship with the runtime.

All of them first convert rows of codes to values, in one of two ways. Codes that the host gathered, one a byte, go
through DequantizeLinear over blocks, one scale and one zero point a block: the fastest operator of ONNX Runtime on a
CPU. Packed codes on the device are gathered by row number and go through GatherBlockQuantized, one kernel on CUDA.
Few large operations follow: a product with the weights for the factor-wise methods (as PEFT), a product with small
matrices for the exact methods. `edgecompose-export merge-graphs` writes them to `edgecompose/graphs/`; a test compares
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgecompose.bundle.atomic import write_bytes
from edgecompose.merging.gather import RESIDENT_BLOCK

#: What is computed from the rows.
_KINDS = ("stack", "linear", "ties_total", "ties_frequency", "mix", "gram")
#: Where the rows come from: gathered by the host, in integers or float16, or packed on the device in 4 or 8 bits.
_SOURCES = ("", "half_", "resident4_", "resident8_")
GRAPHS = ("norm", "copy_codes", "copy_values", *(f"{source}{kind}" for source in _SOURCES for kind in _KINDS))
#: Name, element type and dimensions.
_Input = tuple[str, int, list[int | str]]
_MICROSOFT = "com.microsoft"
_OPSET = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
_FLOAT = TensorProto.FLOAT
#: So steep that HardSigmoid, clamped to [0, 1], is a step for any float32 that is not subnormal.
_STEEP = 1e38


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
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=out, **attributes))
        return out


def build_merge_graph(name: str) -> onnx.ModelProto:
    """One of GRAPHS.

    Inputs of those that read codes of the host: `codes` (blocks, block) uint8, `zero_points` (blocks,) uint8, `scales`
    (rows, blocks a row) float16, `gains` (rows, 1) float32, the factor by which a row's values are multiplied. In
    float16 `codes` is (rows, n), `scales` (rows, 1), and there are no zero points. Inputs of those that read codes on
    the device: `pool` (N, n) or (N, n/2) uint8, `pool_scales` (N, blocks a row) float32, `numbers` (rows,) int32, which
    rows of the pool, `order` = 0, 1, 2, ... (rows,) int32, and `gains`. Then:

    * `stack`: nothing else. The values themselves.
    * `linear`: `weights` (1, K); the rows are those of K adapters, one after another. Sum of weight times values.
    * `ties_total`, `ties_frequency`: `weights`, and `ones` (1, K). Disjoint mean over the elected sign.
    * `mix`: `mix` (L, P, R), `shape` = (L, R, n). Each layer's rows are combined by a matrix.
    * `gram`: `shape` = (L, R, n). Inner products of each layer's rows, (L, R, R).

    `norm` reads values `a` (L, R, n_in), `b` (L, R, n_out) and gives the squared Frobenius norm of a^T b, (L,).
    `copy_codes` and `copy_values` give their input, (N, n).
    """
    b = _Builder()
    if name == "norm":
        sides: list[_Input] = [("a", _FLOAT, ["L", "R", "n"]), ("b", _FLOAT, ["L", "R", "m"])]
        return _model(b, name, sides, output=_norm(b), shape=["L"])
    if name in ("copy_codes", "copy_values"):
        kind = TensorProto.UINT8 if name == "copy_codes" else _FLOAT
        inputs: list[_Input] = [("given", kind, ["N", "n"])]
        copy = b("Identity", "given", out="merged")
        return _model(b, name, inputs, output=copy, shape=["N", "n"], kind=kind)
    source = next(s for s in reversed(_SOURCES) if name.startswith(s))
    return _from_rows(b, name, source=source, kind=name.removeprefix(source))


def _from_rows(b: _Builder, name: str, *, source: str, kind: str) -> onnx.ModelProto:
    """A graph of one of _KINDS whose rows come from `source`."""
    values, inputs = _ROWS[source](b, "merged" if kind == "stack" else "values")
    if kind == "stack":
        return _model(b, name, inputs, output=values, shape=["rows", "width"])
    if kind in ("mix", "gram"):
        inputs.append(("shape", TensorProto.INT64, [3]))
        rows = b("Reshape", values, "shape", out="rows")
        if kind == "gram":
            merged = b("MatMul", rows, _transposed(b, rows, "turned"), out="merged")
            return _model(b, name, inputs, output=merged, shape=["L", "R", "R"])
        inputs.append(("mix", _FLOAT, ["L", "P", "R"]))
        return _model(b, name, inputs, output=b("MatMul", "mix", rows, out="merged"), shape=["L", "P", "n"])
    inputs.append(("weights", _FLOAT, [1, "K"]))
    count = b("Shape", "weights", out="count", start=1)
    shape = b("Concat", count, b.constant("rest", [-1]), out="stacked", axis=0)
    stack = b("Reshape", values, shape, out="stack")  # (K, m)
    if kind == "linear":
        return _model(b, name, inputs, output=b("MatMul", "weights", stack, out="merged"), shape=[1, "m"])
    inputs.append(("ones", _FLOAT, [1, "K"]))
    return _model(b, name, inputs, output=_ties(b, kind, stack), shape=[1, "m"])


def _transposed(b: _Builder, values: str, out: str) -> str:
    return b("Transpose", values, out=out, perm=[0, 2, 1])


def _host_rows(b: _Builder, out: str) -> tuple[str, list[_Input]]:
    """Values (blocks, block) = (code - zero point) * scale * gain of its row."""
    scales = b("Mul", b("Cast", "scales", out="scales32", to=_FLOAT), "gains", out="scaled")
    flat = b("Reshape", scales, b.constant("rest", [-1]), out="block_scales")
    inputs: list[_Input] = [
        ("codes", TensorProto.UINT8, ["blocks", "block"]),
        ("zero_points", TensorProto.UINT8, ["blocks"]),
        ("scales", TensorProto.FLOAT16, ["rows", "row_blocks"]),
        ("gains", _FLOAT, ["rows", 1]),
    ]
    return b("DequantizeLinear", "codes", flat, "zero_points", out=out, axis=0), inputs


def _half_rows(b: _Builder, out: str) -> tuple[str, list[_Input]]:
    """Values (rows, n) = code * scale * gain of its row."""
    scales = b("Mul", b("Cast", "scales", out="scales32", to=_FLOAT), "gains", out="scaled")
    inputs: list[_Input] = [
        ("codes", TensorProto.FLOAT16, ["rows", "width"]),
        ("scales", TensorProto.FLOAT16, ["rows", 1]),
        ("gains", _FLOAT, ["rows", 1]),
    ]
    return b("Mul", b("Cast", "codes", out="codes32", to=_FLOAT), scales, out=out), inputs


def _resident_rows(b: _Builder, out: str, bits: int) -> tuple[str, list[_Input]]:
    """Values (rows, width) of rows of the pool. The scales are gathered apart, since each row has a gain of its own."""
    codes = b("Gather", "pool", "numbers", out="codes", axis=0)
    scales = b("Mul", b("Gather", "pool_scales", "numbers", out="scales", axis=0), "gains", out="scaled")
    values = b(
        "GatherBlockQuantized",
        codes,
        "order",
        scales,
        out=out,
        domain=_MICROSOFT,
        gather_axis=0,
        quantize_axis=1,
        block_size=RESIDENT_BLOCK,
        bits=bits,
    )
    return values, [
        ("pool", TensorProto.UINT8, ["N", "packed"]),
        ("pool_scales", _FLOAT, ["N", "row_blocks"]),
        ("numbers", TensorProto.INT32, ["rows"]),
        ("order", TensorProto.INT32, ["rows"]),
        ("gains", _FLOAT, ["rows", 1]),
    ]


_ROWS: Mapping[str, Callable[[_Builder, str], tuple[str, list[_Input]]]] = {
    "": _host_rows,
    "half_": _half_rows,
    "resident4_": functools.partial(_resident_rows, bits=4),
    "resident8_": functools.partial(_resident_rows, bits=8),
}


def _ties(b: _Builder, name: str, stack: str) -> str:
    """(K, m) -> (1, m): elect a sign for each entry, then take the mean of the values that agree.

    With s the elected sign, x agrees when s x > 0, so that its contribution is s relu(s x).
    """
    one, two = b.constant("one", 1.0, np.float32), b.constant("two", 2.0, np.float32)
    if name == "ties_total":
        votes = b("MatMul", "ones", stack, out="votes")
    else:  # 1, 1/2 and 0 for positive, zero and negative values, against half of their number
        shares = b("HardSigmoid", stack, out="shares", alpha=_STEEP, beta=0.5)
        half = b("Div", b("ReduceSum", "ones", out="number", keepdims=0), two, out="half")
        votes = b("Sub", b("MatMul", "ones", shares, out="share"), half, out="votes")
    positive = b("HardSigmoid", votes, out="positive", alpha=_STEEP, beta=1.0)  # a tie counts as positive
    sign = b("Sub", b("Mul", positive, two, out="doubled"), one, out="sign")
    agreeing = b("Relu", b("Mul", stack, sign, out="signed"), out="agreeing")
    total = b("MatMul", "weights", agreeing, out="total")
    present = b("HardSigmoid", agreeing, out="present", alpha=_STEEP, beta=0.0)
    count = b("Max", b("MatMul", "ones", present, out="agree"), one, out="divisor")
    return b("Div", b("Mul", total, sign, out="signed_total"), count, out="merged")


def _norm(b: _Builder) -> str:
    gram_a = b("MatMul", "a", _transposed(b, "a", "a_turned"), out="a_gram")
    gram_b = b("MatMul", "b", _transposed(b, "b", "b_turned"), out="b_gram")
    return b("ReduceSum", b("Mul", gram_a, gram_b, out="both"), b.constant("axes", [1, 2]), out="merged", keepdims=0)


def _model(
    b: _Builder, name: str, inputs: list[_Input], *, output: str, shape: list[int | str], kind: int = _FLOAT
) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(*described) for described in inputs]
    result = helper.make_tensor_value_info(output, kind, shape)
    graph = helper.make_graph(b.nodes, name, inputs=infos, outputs=[result], initializer=b.constants)
    model = helper.make_model(graph, opset_imports=_OPSET, ir_version=10, producer_name="edgecompose")
    onnx.checker.check_model(model, full_check=True)
    return model


def build_probe() -> onnx.ModelProto:
    """One node, to learn whether a provider can be opened."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Add", ["x", "x"], ["y"], name="Add")
    graph = helper.make_graph([node], name="probe", inputs=[value], outputs=[out])
    return helper.make_model(graph, opset_imports=_OPSET, ir_version=10, producer_name="edgecompose")


def build_copy() -> onnx.ModelProto:
    """One node that copies bytes, from where its input is bound to where its output is."""
    value = helper.make_tensor_value_info("x", TensorProto.UINT8, ["n"])
    out = helper.make_tensor_value_info("y", TensorProto.UINT8, ["n"])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"], name="copy")], "copy", [value], [out])
    return helper.make_model(graph, opset_imports=_OPSET, ir_version=10, producer_name="edgecompose")


def all_graphs() -> dict[str, bytes]:
    """Path below the package `edgecompose`, and bytes, of every graph that it ships."""
    graphs = {f"merging/graphs/{name}.onnx": build_merge_graph(name) for name in GRAPHS}
    graphs["engine/probe.onnx"] = build_probe()
    graphs["engine/copy.onnx"] = build_copy()
    return {name: bytes(graph.SerializeToString(deterministic=True)) for name, graph in graphs.items()}


def write_graphs(folder: Path) -> list[Path]:
    """Write every graph below `folder`, the package `edgecompose`; return the paths."""
    paths = []
    for name, content in all_graphs().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
        paths.append(path)
    return paths
