"""A decoder graph that caches keys and values in 8 or 4 bits, everything else as in the original graph.

ONNX Runtime's attention on CPUs (GroupQueryAttention) rounds keys and values as it appends them to the cache, and reads
the codes in its products. Each channel of each head has a constant scale. Codes of 8 bits are int8; two codes of 4 bits
share a byte. Weights stay in the data file of the decoder beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgecompose.errors import ExportError

Bits = Literal[8, 4]
PARTS = ("key", "value")
#: Places of the scales of keys and of values among the inputs of GroupQueryAttention.
_PLACES = {"key": 12, "value": 13}
_PAST, _PRESENT = "past_key_values.", "present."


def largest_code(bits: Bits) -> int:
    """The largest code that has a negative twin."""
    return (1 << (bits - 1)) - 1


def scale_name(cache: str) -> str:
    """The tensor (kv_heads * head_size,) of the scales of a cache such as `0.key`."""
    return f"{cache}/scale"


def write_kv_graph(graph: Path, bits: Bits, scales: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """Write `<name>_kv<bits>.onnx` beside a decoder graph.

    Args:
        graph: a saved decoder.
        scales: by cache, such as `0.key`: the step between two codes of each channel, (kv_heads * head_size,).

    Returns:
        The name of the new file.

    Raises:
        ExportError: the graph has no attention node that can be converted.
    """
    model = onnx.load(graph, load_external_data=False)
    narrow_caches(model.graph, bits)
    tensors = (numpy_helper.from_array(values, scale_name(cache)) for cache, values in scales.items())
    model.graph.initializer.extend(tensors)
    target = graph.with_name(f"{graph.stem}_kv{bits}.onnx")
    target.write_bytes(model.SerializeToString())
    return target.name


def narrow_caches(graph: onnx.GraphProto, bits: Bits) -> list[str]:
    """Let attention cache codes, in place; the scales are yet to be added to the graph.

    Returns:
        The caches whose scales attention reads now, such as `0.key`.
    """
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attention:
        raise ExportError("the decoder graph has no GroupQueryAttention node; this architecture is not supported")
    caches = []
    for node in attention:
        node.input.extend([""] * (max(_PLACES.values()) + 1 - len(node.input)))
        for part, past in zip(PARTS, node.input[3:5], strict=True):
            cache = past.removeprefix(_PAST)
            node.input[_PLACES[part]] = scale_name(cache)
            node.attribute.append(helper.make_attribute(f"{part[0]}_quant_type", "PER_CHANNEL"))
            caches.append(cache)
        node.attribute.append(helper.make_attribute("kv_cache_bit_width", bits))
    for value in (*graph.input, *graph.output):
        if value.name.startswith((_PAST, _PRESENT)):
            kind = value.type.tensor_type
            kind.elem_type = TensorProto.INT8 if bits == 8 else TensorProto.UINT8
            if bits == 4:
                kind.shape.dim[3].dim_value //= 2
    return caches
