"""A decoder on its stored weights, run block by block with the kernels that decode with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from edgecompose.engine.device import Device, choose_device
from edgecompose_export.calibration.block_graph import block_model, open_graph, sequence_feeds
from edgecompose_export.calibration.logits import final_norm, scaled_logits, vocabulary_chunks
from edgecompose_export.calibration.reference import require_finite
from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.graphs.decoder import Weights
from edgecompose_export.graphs.writer import GraphWriter
from edgecompose_export.weights.blocks import Float
from edgecompose_export.weights.source import WeightSource


def stored_states(
    source: WeightSource,
    weights: Weights,
    folder: Path,
    *,
    prompts: Sequence[Sequence[int]],
    advance: Callable[[int], None] = lambda count: None,
) -> list[Float]:
    """Hidden states of prompts from stored weights; compare with `float_states`.

    Args:
        weights: of a decoder in `folder`.
        advance: called with 1 after each block.
    """
    config, device = source.config, choose_device("cpu")
    streams = [stream[None] for stream in _stored_embeddings(config, weights, folder, device=device, prompts=prompts)]
    for layer in range(len(config.layers)):
        session = open_graph(block_model(config, weights, [layer]), folder, device)
        streams = [session.run(["hidden_out"], sequence_feeds(config, layer, stream))[0] for stream in streams]
        require_finite(streams, f"stored layer {layer} of base '{source.name}'")
        del session
        advance(1)
    return [final_norm(source, stream[0]) for stream in streams]


def stored_logits(config: DecoderConfig, weights: Weights, folder: Path, *, states: Float) -> Iterator[Float]:
    """Logits of hidden states from a stored output layer, in the same chunks as `float_logits`."""
    graph = GraphWriter("head")
    hidden = graph.input("hidden", TensorProto.FLOAT, ["batch", "s", config.hidden])
    product = weights.head(graph, hidden)
    whole = graph.model()
    device = choose_device("cpu")
    for start, stop in vocabulary_chunks(config, len(states)):
        chunk = _head_rows(whole, product, total=config.vocabulary, start=start, stop=stop)
        session = open_graph(chunk, folder, device)
        yield scaled_logits(config, session.run([product], {"hidden": states[None]})[0][0])


def _stored_embeddings(
    config: DecoderConfig, weights: Weights, folder: Path, *, device: Device, prompts: Sequence[Sequence[int]]
) -> list[Float]:
    graph = GraphWriter("embedding")
    rows = weights.embed(graph, graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]))
    graph.output(rows, TensorProto.FLOAT, ["batch_size", "sequence_length", config.hidden])
    session = open_graph(graph.model(), folder, device)
    scale = np.float32(config.embedding_multiplier)
    return [session.run([rows], {"input_ids": np.array([prompt], np.int64)})[0][0] * scale for prompt in prompts]


def _head_rows(whole: onnx.ModelProto, product: str, *, total: int, start: int, stop: int) -> onnx.ModelProto:
    """A copy of a graph of one product that reads only rows `start` .. `stop` of the `total` rows of its weight."""
    model = onnx.ModelProto.FromString(whole.SerializeToString())
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry for entry in tensor.external_data}
        offset, size = int(entries["offset"].value), int(entries["length"].value)
        tensor.dims[0] = tensor.dims[0] // total * (stop - start)
        entries["offset"].value = str(offset + size // total * start)
        entries["length"].value = str(size // total * (stop - start))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "N":
                attribute.i = stop - start
    model.graph.output.append(onnx.helper.make_tensor_value_info(product, TensorProto.FLOAT, None))
    return model
