"""Saves graphs of other programs with their tensors in a data file beside them."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph of less than 2 GiB, and its tensors into a data file beside it, which ONNX Runtime maps."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    copy = onnx.ModelProto.FromString(graph.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location=data.name, size_threshold=1024)
    store_reshaped(path)


def store_reshaped(path: Path) -> None:
    """Replace each reshaping of a stored tensor by a stored tensor over the same bytes of the data file.

    Otherwise ONNX Runtime would reshape it into a copy that stays in memory.
    """
    model = onnx.load(path, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    reshapes = [n for n in model.graph.node if n.op_type == "Reshape" and all(name in stored for name in n.input)]
    for node in reshapes:
        tensor, shape = stored[node.input[0]], numpy_helper.to_array(stored[node.input[1]])
        if tensor.data_location == TensorProto.EXTERNAL and shape.min() > 0:
            copy = TensorProto.FromString(tensor.SerializeToString())
            copy.name, copy.dims[:] = node.output[0], shape.tolist()
            model.graph.initializer.append(copy)
            model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [t for t in model.graph.initializer if t.name not in read]:
        model.graph.initializer.remove(tensor)
    path.write_bytes(model.SerializeToString())
