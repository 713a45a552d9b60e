"""Writes ONNX graphs node by node, and their large tensors row by row into a data file beside the graph."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"
_ALIGNMENT = 64
_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "uint8": TensorProto.UINT8,
}
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}


class DataFile:
    """The data file of a decoder: places are reserved first and filled in any order, in small chunks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorProto] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write buffered bytes to the disk, and close the file."""
        try:
            self._file.truncate(self._end)
        finally:
            self._file.close()

    def reserve(self, name: str, dtype: str, shape: Sequence[int]) -> str:
        """Make room for a tensor and describe it; return its name.

        Args:
            dtype: 'float32', 'float16', 'bfloat16' or 'uint8'.
        """
        size = int(np.prod(shape, dtype=np.int64)) * _SIZES[dtype]
        offset = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._end = offset + size
        self._places[name] = (offset, size)
        self.tensors[name] = self._external(name, _TYPES[dtype], shape)
        return name

    def alias(self, name: str, other: str, shape: Sequence[int]) -> str:
        """Describe the bytes of another tensor a second time, with another shape."""
        self._places[name] = self._places[other]
        self.tensors[name] = self._external(name, self.tensors[other].data_type, shape)
        return name

    def write(self, name: str, values: npt.NDArray[Any], position: int = 0) -> int:
        """Write bytes into the place of a tensor, from byte `position` on; return the position after them."""
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        offset, size = self._places[name]
        if position + raw.size > size:
            raise ValueError(f"'{name}' has {size} bytes, got {position + raw.size}")
        self._file.seek(offset + position)
        self._file.write(raw.data)
        return position + raw.size

    def _external(self, name: str, dtype: int, shape: Sequence[int]) -> TensorProto:
        """A tensor whose bytes lie at its place in the data file."""
        offset, size = self._places[name]
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.path.name), ("offset", str(offset)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        return tensor


class GraphWriter:
    """A graph under construction: nodes in order, initializers, inputs and outputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.outputs: dict[str, onnx.ValueInfoProto] = {}

    def node(self, op: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, after which the node is named; return the output."""
        return self.nodes_of(op, inputs, [output], domain=domain, **attributes)[0]

    def nodes_of(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; return them."""
        name = next(output for output in outputs if output)
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{name}/{op}", domain=domain, **attributes))
        return list(outputs)

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare an input."""
        self.inputs[name] = helper.make_tensor_value_info(name, dtype, shape)
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare an output."""
        self.outputs[name] = helper.make_tensor_value_info(name, dtype, shape)
        return name

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        """The name of a small constant; equal constants are stored once."""
        array = np.asarray(values, dtype)
        shape = "x".join(map(str, array.shape)) or "scalar"
        name = f"constant.{array.dtype.name}.{shape}.{hashlib.sha256(array.tobytes()).hexdigest()[:12]}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def tensor(self, tensor: TensorProto) -> str:
        """Add a tensor; return its name."""
        self.initializers[tensor.name] = tensor
        return str(tensor.name)

    def model(self) -> onnx.ModelProto:
        """The graph as a model; large tensors are references to the data file."""
        graph = helper.make_graph(
            self.nodes,
            self.name,
            inputs=list(self.inputs.values()),
            outputs=list(self.outputs.values()),
            initializer=list(self.initializers.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgecompose")

    def save(self, path: Path) -> None:
        """Write the graph."""
        path.write_bytes(self.model().SerializeToString())
