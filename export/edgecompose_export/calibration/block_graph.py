"""Blocks of a decoder as small graphs, so that only one block is in memory.

The inputs are the same for all weights: a whole sequence from position 0, with an empty cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from edgecompose.engine.device import Device, Session, open_session
from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.graphs.block import BlockWeights, write_blocks
from edgecompose_export.graphs.writer import GraphWriter
from edgecompose_export.weights.blocks import Float


def block_model(config: DecoderConfig, weights: BlockWeights, layers: Sequence[int]) -> onnx.ModelProto:
    """Blocks without slots: `hidden_in` to `hidden_out` (batch, s, hidden)."""
    graph = GraphWriter("blocks")
    hidden = graph.input("hidden_in", TensorProto.FLOAT, ["batch_size", "sequence_length", config.hidden])
    graph.input("seqlens_k", TensorProto.INT32, ["batch_size"])
    graph.input("total_sequence_length", TensorProto.INT32, [])
    ids = graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    graph.node("Identity", [ids], "ids_seen")  # blocks read its shape only
    stream, pending = write_blocks(graph, config, weights, layers=layers, hidden=hidden, slots=False)
    assert pending is not None
    graph.node("Add", [stream, pending], "hidden_out")
    graph.output("hidden_out", TensorProto.FLOAT, ["batch_size", "sequence_length", config.hidden])
    return graph.model()


def sequence_feeds(config: DecoderConfig, layer: int, hidden: Float) -> dict[str, npt.NDArray[np.generic]]:
    """Inputs of the graph of a block for the stream (batch, s, hidden)."""
    batch, length, _ = hidden.shape
    empty = np.zeros((batch, config.kv_heads, 0, config.head_size), np.float32)
    return {
        "hidden_in": hidden,
        "seqlens_k": np.full(batch, length, np.int32),
        "query_seqlens": np.full(batch, length + 1, np.int32),
        "total_sequence_length": np.array(length + 1, np.int32),
        "input_ids": np.zeros((batch, length), np.int64),
        f"past_key_values.{layer}.key": empty,
        f"past_key_values.{layer}.value": empty,
    }


def open_graph(model: onnx.ModelProto, folder: Path | None, device: Device) -> Session:
    """A session of a graph in memory, whose tensors lie in the data file of a folder."""
    return open_session(model.SerializeToString(), device, name="block", folder=folder)
