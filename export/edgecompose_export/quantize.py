"""Weight quantisation of a decoder graph; knows nothing of adapters.

Both schemes use blocks of 32 weights along the input axis and ONNX Runtime's MatMulNBits kernel
with int8 activations (accuracy level 4).

* 8 bits: w = s (q - 128), s = max|w| / 127. Lossless for a GGUF's Q8_0 tensors.
* 4 bits: w = d q + m with d = (max - min) / 15, m = min: lossless for a GGUF's Q4_1 tensors. The kernel
  is the symmetric one, w = d (q - 8) + (m + 8 d), because ORT has no fast one for float zero points. The second
  term is blocksums(x) @ C with C (K/32, N). As a product of its own, of one thread and float32, it takes a sixth
  of a token's time; so x is extended by copies of its block sums, and the rows by what C is in 4 bits and, behind
  it, by what those leave of C in 4 bits more: C is kept to a two-hundredth of its largest value.
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
    return _packed(codes), scales[..., 0].astype(np.float32), (low + 8 * scales)[..., 0].astype(np.float32)


def extend_rows_4bit(correction: Float) -> tuple[Bytes, Float, int]:
    """Blocks that add blocksums(x) @ C to the product of a row, when x is followed by copies of its block sums.

    The first copy meets C in 4 bits; the columns behind the block that this ends in meet, each once, what is left of C.
    Columns that are left over meet 0.

    Args:
        correction: C transposed, (N, nb).

    Returns:
        codes (N, blocks, 16) uint8, scales (N, blocks) float32, and the number of copies.
    """
    rows, count = correction.shape
    start = -(-count // BLOCK) * BLOCK
    copies = -(-(start + count) // count)
    blocks = -(-(copies * count) // BLOCK)
    columns = np.zeros((rows, blocks * BLOCK), np.float32)
    columns[:, :count] = correction
    codes, scales = _symmetric_4bit(columns)
    left = correction - _values_4bit(codes, scales)[:, :count]
    behind = np.arange(start, start + count)
    columns[:, behind] = left[:, behind % count]
    codes, scales = _symmetric_4bit(columns)
    return _packed(codes), scales, copies


def _symmetric_4bit(rows: Float) -> tuple[Bytes, Float]:
    """Codes (N, blocks, 32) around 8 and scales (N, blocks); the value of largest size is -8 steps, and exact."""
    blocks = rows.reshape(len(rows), -1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scales = largest / np.float32(-8)
    codes = np.clip(np.rint(blocks / np.where(scales == 0, np.float32(1), scales)) + 8, 0, 15)
    return codes.astype(np.uint8), scales[..., 0].astype(np.float32)


def _packed(codes: Bytes) -> Bytes:
    """Two codes a byte, low nibble first."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def _values_4bit(codes: Bytes, scales: Float) -> Float:
    return ((codes.astype(np.float32) - 8) * scales[..., None]).reshape(len(codes), -1)


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
    more_codes, more_scales, copies = extend_rows_4bit(correction)
    width = rows.shape[1] + copies * correction.shape[1]
    _make_nbits(
        graph, node, np.concatenate([codes, more_codes], 1), np.concatenate([scales, more_scales], 1),
        (len(rows), width), 4,
    )  # fmt: skip
    node.input[0] = _extended(graph, node, copies)


def _extended(graph: onnx.GraphProto, node: onnx.NodeProto, copies: int) -> str:
    """What a linear node reads, followed by copies of its sums over blocks of 32; made once for all that read it."""
    source = node.input[0]
    extended, blocks, sums = f"{source}/extended", f"{source}/blocks", f"{source}/blocksums"
    if any(extended in n.output for n in graph.node):
        return extended
    for name, value in (("blocksum.shape", [0, 0, -1, BLOCK]), ("blocksum.axis", [-1])):
        if not any(t.name == name for t in graph.initializer):
            graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    steps = [
        helper.make_node("Reshape", [source, "blocksum.shape"], [blocks], f"{node.name}/Blocks"),
        helper.make_node("ReduceSum", [blocks, "blocksum.axis"], [sums], f"{node.name}/Sums", keepdims=0),
        helper.make_node("Concat", [source, *[sums] * copies], [extended], f"{node.name}/Extend", axis=-1),
    ]
    position = list(graph.node).index(node)
    for step in reversed(steps):
        graph.node.insert(position, step)
    return extended


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
