"""Weight quantisation of a decoder graph; knows nothing of adapters.

Both schemes use blocks of 32 weights along the input axis and ONNX Runtime's MatMulNBits kernel
with int8 activations (accuracy level 4).

* 8 bits: w = s (q - 128), s = max|w| / 127. Lossless for a GGUF's Q8_0 tensors.
* 4 bits: w = d q + m with d = (max - min) / 15, m = min: lossless for a GGUF's Q4_1 tensors. The kernel
  is the symmetric one, w = d (q - 8) + (m + 8 d), and the second term is added as
  blocksums(x) @ C with C (K/32, N), because ORT has no fast kernel for float zero points.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgecompose.errors import ExportError
from edgecompose_export.slots import find_linears, output_layer

BLOCK = 32
Float = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def quantize_rows_8bit(rows: Float) -> tuple[Bytes, Float]:
    """Symmetric 8-bit blocks.

    Args:
        rows: (N, K) float32, K a multiple of 32.

    Returns:
        codes (N, K/32, 32) uint8 around 128, scales (N, K/32) float32.
    """
    blocks = rows.reshape(rows.shape[0], -1, BLOCK)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks / np.where(scales == 0, np.float32(1), scales)) + 128
    return codes.astype(np.uint8), scales[..., 0].astype(np.float32)


def quantize_rows_4bit(rows: Float) -> tuple[Bytes, Float, Float]:
    """Affine 4-bit blocks, two codes a byte (low nibble first).

    Args:
        rows: (N, K) float32, K a multiple of 32.

    Returns:
        codes (N, K/32, 16) uint8, scales d (N, K/32), corrections m + 8 d (N, K/32), float32.
    """
    blocks = rows.reshape(rows.shape[0], -1, BLOCK)
    low = blocks.min(-1, keepdims=True)
    scales = (blocks.max(-1, keepdims=True) - low) / np.float32(15)
    codes = np.rint((blocks - low) / np.where(scales == 0, np.float32(1), scales)).astype(np.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed, scales[..., 0].astype(np.float32), (low + 8 * scales)[..., 0].astype(np.float32)


def quantize_decoder(model: onnx.ModelProto, bits: int) -> None:
    """Replace the float weights of all linear nodes and of the output layer, in place.

    The output layer is always 8 bits, and a tied embedding reads the same bytes.

    Raises:
        ExportError: an input width that is not a multiple of 32.
    """
    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    head = output_layer(graph)
    if head.op_type != "MatMul" or head.input[1] not in weights:
        raise ExportError(f"the output layer is a {head.op_type} of no constant weight; use --precision fp32 or fp16")
    for linear in find_linears(graph):
        rows = _rows(weights[linear.node.input[1]], linear.node.name)
        (_to_8bit if bits == 8 else _to_4bit)(graph, linear.node, rows)
    head_name = head.input[1]
    _to_8bit(graph, head, _rows(weights[head_name], head.name))
    _tie_embedding(graph, head_name, head.input[1], head.input[2])
    _drop_unread(graph)


def _rows(tensor: onnx.TensorProto, node: str) -> Float:
    rows = np.ascontiguousarray(numpy_helper.to_array(tensor).T.astype(np.float32))
    if rows.shape[1] % BLOCK:
        raise ExportError(f"'{node}' takes {rows.shape[1]} inputs; quantisation wants a multiple of {BLOCK}")
    return rows


def _to_8bit(graph: onnx.GraphProto, node: onnx.NodeProto, rows: Float) -> None:
    codes, scales = quantize_rows_8bit(rows)
    _make_nbits(graph, node, codes, scales, rows.shape, 8)


def _to_4bit(graph: onnx.GraphProto, node: onnx.NodeProto, rows: Float) -> None:
    codes, scales, correction = quantize_rows_4bit(rows)
    source, target = node.input[0], node.output[0]
    _make_nbits(graph, node, codes, scales, rows.shape, 4)
    node.output[0] = f"{target}/symmetric"
    constants = {f"{node.name}.C": correction.T.copy(), f"{node.name}.shape": np.array([0, 0, -1, BLOCK], np.int64)}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(value, name))
    sums = f"{source}/blocksums"
    extra = [] if any(sums in n.output for n in graph.node) else [
        helper.make_node("Reshape", [source, f"{node.name}.shape"], [f"{source}/blocks"], f"{node.name}/Blocks"),
        helper.make_node("ReduceSum", [f"{source}/blocks", "blocksum.axis"], [sums], f"{node.name}/Sums", keepdims=0),
    ]  # fmt: skip
    if not any(t.name == "blocksum.axis" for t in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "blocksum.axis"))
    extra.append(helper.make_node("MatMul", [sums, f"{node.name}.C"], [f"{target}/offset"], f"{node.name}/Offset"))
    parts = [f"{target}/symmetric", f"{target}/offset"]
    slot = next((n for n in graph.node if n.op_type == "Add" and n.input[0] == target), None)
    if slot is not None:  # one sum of three instead of two additions
        slot.op_type = "Sum"
        slot.input[0] = parts[0]
        slot.input.append(parts[1])
    else:
        extra.append(helper.make_node("Add", parts, [target], f"{node.name}/Affine"))
    position = list(graph.node).index(node)
    for step, new in enumerate(extra, start=1):
        graph.node.insert(position + step, new)


def _make_nbits(
    graph: onnx.GraphProto, node: onnx.NodeProto, codes: Bytes, scales: Float, shape: tuple[int, ...], bits: int
) -> None:
    """Turn a MatMul node into MatMulNBits, in place."""
    name = node.input[1]
    graph.initializer.append(numpy_helper.from_array(codes, f"{name}.q{bits}"))
    graph.initializer.append(numpy_helper.from_array(scales.reshape(-1), f"{name}.scales"))
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    node.input[1] = f"{name}.q{bits}"
    node.input.append(f"{name}.scales")
    attributes = {"K": shape[1], "N": shape[0], "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
    node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())


def _tie_embedding(graph: onnx.GraphProto, head: str, codes: str, scales: str) -> None:
    """Let an embedding that is the transposed output layer read the quantised rows."""
    transpose = next((n for n in graph.node if n.op_type == "Transpose" and n.input[0] == head), None)
    if transpose is None:
        return
    gather = next(n for n in graph.node if n.op_type == "Gather" and n.input[0] == transpose.output[0])
    tensors = {t.name: t for t in graph.initializer}
    vocabulary, blocks, _ = tensors[codes].dims
    for name, shape in (("rows", [vocabulary, blocks * BLOCK]), ("row_scales", [vocabulary, blocks])):
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"embed_tokens.{name}.shape"))
    reshapes = [
        helper.make_node("Reshape", [codes, "embed_tokens.rows.shape"], ["embed_tokens.rows"], "embed_tokens/Rows"),
        helper.make_node(
            "Reshape", [scales, "embed_tokens.row_scales.shape"], ["embed_tokens.row_scales"], "embed_tokens/Scales"
        ),
    ]
    embedding = helper.make_node(
        "GatherBlockQuantized", ["embed_tokens.rows", gather.input[1], "embed_tokens.row_scales"],
        list(gather.output), "embed_tokens/Gather", domain="com.microsoft",
        gather_axis=0, quantize_axis=1, block_size=BLOCK, bits=8,
    )  # fmt: skip
    position = list(graph.node).index(transpose)
    graph.node.remove(transpose)
    graph.node.remove(gather)
    for node in (embedding, *reversed(reshapes)):
        graph.node.insert(position, node)


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {i for n in graph.node for i in n.input}
    kept = [t for t in graph.initializer if t.name in read]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
