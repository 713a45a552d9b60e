"""The reference: a decoder on the float values of the base's file, run block by block over whole prompts.

Nothing of the stored forms enters it. The graphs of its blocks read their weights from inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto

from edgecompose.engine.device import Device, Session, choose_device
from edgecompose.errors import ExportError
from edgecompose_export.calibration.block_graph import block_model, open_graph, sequence_feeds
from edgecompose_export.calibration.kv_scales import KVRanges
from edgecompose_export.calibration.logits import final_norm
from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.graphs.block import INPUT_GROUPS
from edgecompose_export.graphs.kv_cache import PARTS, Bits, narrow_caches, scale_name
from edgecompose_export.graphs.writer import MICROSOFT, GraphWriter
from edgecompose_export.weights.blocks import Float
from edgecompose_export.weights.places import EMBEDDING
from edgecompose_export.weights.source import WeightSource

#: The tap of the largest absolute value of queries, keys and values.
LARGEST = "largest"
#: Module -> the tap of its input. A tap is an output that a block has for measurements.
TAPS: Mapping[str, str] = {module: group[0] for group in INPUT_GROUPS for module in group}


class InputWeights:
    """Weights that blocks take as inputs, float32, each module by itself."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config
        self.taps: dict[str, str] = {}

    def parameter(self, graph: GraphWriter, tensor: str) -> str:
        """As `BlockWeights`."""
        return graph.input(tensor, TensorProto.FLOAT, [f"size of {tensor}"])

    def groups(self, layer: int, modules: Sequence[str]) -> list[tuple[str, ...]]:
        """Each module by itself."""
        return [(module,) for module in modules]

    def product(self, graph: GraphWriter, layer: int, modules: Sequence[str], *, source: str, target: str) -> str:
        """As `BlockWeights`."""
        (module,) = modules
        if TAPS[module] == module:
            self.taps[module] = source
        weight = graph.input(f"{layer}.{module}.weight", TensorProto.FLOAT, list(self._config.widths[module]))
        biased = module in self._config.biases
        plain = f"{target}/unbiased" if biased else target
        graph.node("FusedMatMul", [source, weight], plain, domain=MICROSOFT, transB=1)
        if not biased:
            return target
        return graph.node("Add", [plain, self.parameter(graph, f"{layer}.{module}.bias")], target)


class FloatBlocks:
    """Runs blocks on the float values of their weights, which it reads from the source."""

    def __init__(self, source: WeightSource, device: Device | None = None) -> None:
        self._source, self._config = source, source.config
        self._device = device or choose_device("cpu")
        self._sessions: dict[object, tuple[Session, int, list[str]]] = {}
        self._kv_sessions: dict[object, tuple[Session, int]] = {}

    def load(self, layer: int) -> dict[str, Float]:
        """The weights of a block, by tensor."""
        session, example, _ = self._session(layer)
        prefix = f"{example}."
        names = [i.name.removeprefix(prefix) for i in session.get_inputs() if i.name.startswith(prefix)]
        return {f"{layer}.{name}": self._source.floats(f"{layer}.{name}") for name in names}

    def run(
        self, layer: int, weights: Mapping[str, Float], hidden: Float, *, taps: bool = False
    ) -> tuple[Float, dict[str, Float]]:
        """The stream after a block, and its taps.

        Args:
            weights: the result of `load`, or others of the same shapes.
            hidden: the stream before it, (batch, s, hidden), from position 0.
            taps: also return the inputs of linear modules, by the names in TAPS, the largest of attention's inputs,
                and what is cached, (1, kv_heads, s, head_size) by the names in PARTS.
        """
        session, example, names = self._session(layer)
        feeds = sequence_feeds(self._config, example, hidden) | _named_after(example, weights)
        outputs = ["hidden_out"]
        if taps:
            outputs += [*(f"tap.{name}" for name in names), *(f"present.{example}.{part}" for part in PARTS)]
        results = session.run(outputs, feeds)
        tapped = dict(zip([*names, *PARTS], results[1:], strict=True)) if taps else {}
        return results[0], {n: v[:, :, : hidden.shape[1]] if n in PARTS else v for n, v in tapped.items()}

    def run_cached(
        self, layer: int, weights: Mapping[str, Float], hidden: Float, bits: Bits, scales: Mapping[str, Float]
    ) -> Float:
        """The stream after a block that caches keys and values in so many bits; arguments are as those of `run`.

        Args:
            scales: of the channels of both caches, by the names in PARTS.
        """
        session, example = self._kv_session(layer, bits)
        feeds = sequence_feeds(self._config, example, hidden) | _named_after(example, weights)
        for part in PARTS:
            feeds[scale_name(f"{example}.{part}")] = scales[part]
            shape = (1, self._config.kv_heads, 0, self._config.head_size * bits // 8)
            feeds[f"past_key_values.{example}.{part}"] = np.zeros(shape, np.int8 if bits == 8 else np.uint8)
        return np.asarray(session.run(["hidden_out"], feeds)[0], np.float32)

    def _kv_session(self, layer: int, bits: Bits) -> tuple[Session, int]:
        """A session for blocks of this kind with such caches, and the first such block."""
        kind = self._config.layers[layer], bits
        if kind not in self._kv_sessions:
            model = block_model(self._config, InputWeights(self._config), [layer])
            for cache in narrow_caches(model.graph, bits):
                shape = [self._config.kv_heads * self._config.head_size]
                model.graph.input.append(
                    onnx.helper.make_tensor_value_info(scale_name(cache), TensorProto.FLOAT, shape)
                )
            self._kv_sessions[kind] = open_graph(model, None, self._device), layer
        return self._kv_sessions[kind]

    def _session(self, layer: int) -> tuple[Session, int, list[str]]:
        """A session for blocks of this kind, the first such block (after which its inputs are named), and its taps."""
        kind = self._config.layers[layer]
        if kind not in self._sessions:
            weights = InputWeights(self._config)
            model = block_model(self._config, weights, [layer])
            taps = dict(weights.taps)
            for name, value in taps.items():
                model.graph.node.append(onnx.helper.make_node("Identity", [value], [f"tap.{name}"]))
            model.graph.node.extend(_largest_attended(model.graph))
            for name in (*taps, LARGEST):
                model.graph.output.append(onnx.helper.make_tensor_value_info(f"tap.{name}", TensorProto.FLOAT, None))
            session = open_graph(model, None, self._device)
            self._sessions[kind] = (session, layer, [*taps, LARGEST])
        return self._sessions[kind]


@dataclass(frozen=True, slots=True, eq=False)
class FloatStates:
    """A run of the reference.

    Attributes:
        states: inputs of the output layer, (s, hidden) for each prompt.
        largest: the largest absolute value of queries, keys and values in all blocks.
        importance: for the weight of each linear module the mean square of its input, (n_in,).
        kv_scales: by bits, by cache such as `0.key`: the scales of its channels, (kv_heads * head_size,).
        kv_states: by bits: the states that keys and values in so many bits give.
    """

    states: list[Float]
    largest: float
    importance: Mapping[str, Float]
    kv_scales: Mapping[Bits, Mapping[str, Float]] = field(default_factory=dict)
    kv_states: Mapping[Bits, list[Float]] = field(default_factory=dict)


def float_states(
    source: WeightSource,
    prompts: Sequence[Sequence[int]],
    *,
    kv_bits: Sequence[Bits] = (),
    kv_texts: Sequence[Sequence[int]] = (),
    advance: Callable[[int], None] = lambda count: None,
) -> FloatStates:
    """Hidden states of prompts from the float values of a base's file.

    Args:
        kv_bits: also with keys and values in so many bits, whose scales are measured here.
        kv_texts: token ids of more texts that those scales are measured on.
        advance: called with 1 after each block.
    """
    blocks, largest, importance = FloatBlocks(source), 0.0, {}
    streams = [embedded(source, prompt) for prompt in prompts]
    texts = [embedded(source, text) for text in kv_texts]
    cached = dict.fromkeys(kv_bits, streams)
    kv_scales: dict[Bits, dict[str, Float]] = {bits: {} for bits in kv_bits}
    for layer in range(len(source.config.layers)):
        weights = blocks.load(layer)
        runs = [blocks.run(layer, weights, stream, taps=True) for stream in streams]
        streams = require_finite([stream for stream, _ in runs], f"layer {layer} of base '{source.name}'")
        largest = max(largest, *(float(taps[LARGEST].max()) for _, taps in runs))
        for module, tap in TAPS.items():
            squares = np.mean([np.square(taps[tap]).mean((0, 1)) for _, taps in runs], axis=0)
            importance[f"{layer}.{module}.weight"] = squares.astype(np.float32)
        text_runs = [blocks.run(layer, weights, text, taps=True) for text in texts]
        texts = [text for text, _ in text_runs]
        ranges = KVRanges.of(source.config, layer, [taps for _, taps in (*runs, *text_runs)])
        for bits in kv_bits:
            scales = ranges.scales(bits)
            kv_scales[bits] |= {f"{layer}.{part}": values for part, values in scales.items()}
            cached[bits] = [blocks.run_cached(layer, weights, stream, bits, scales) for stream in cached[bits]]
        advance(1)
    states = {bits: [final_norm(source, stream[0]) for stream in parts] for bits, parts in cached.items()}
    return FloatStates([final_norm(source, stream[0]) for stream in streams], largest, importance, kv_scales, states)


def require_finite(streams: list[Float], what: str) -> list[Float]:
    """The streams, if all their numbers are finite.

    Raises:
        ExportError: some are not; the message begins with `what`.
    """
    if not all(np.isfinite(stream).all() for stream in streams):
        raise ExportError(f"{what} gives numbers that are not finite; its weights are damaged, copy it again")
    return streams


def embedded(source: WeightSource, ids: Sequence[int]) -> Float:
    """Embeddings (1, s, hidden) of token ids, with the multiplier of the architecture."""
    rows = np.concatenate([source.floats(EMBEDDING, i, i + 1) for i in ids])
    return (rows * np.float32(source.config.embedding_multiplier))[None]


def _named_after(example: int, weights: Mapping[str, Float]) -> dict[str, Float]:
    """Weights of a block by the names of the inputs of a graph that was made for another."""
    return {f"{example}.{name.split('.', 1)[1]}": values for name, values in weights.items()}


def _largest_attended(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that compute the largest absolute value of the inputs of attention."""
    attention = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    nodes, tops = [], []
    for i, value in enumerate(attention.input[:3]):
        nodes += [
            onnx.helper.make_node("Abs", [value], [f"attended.{i}"]),
            onnx.helper.make_node("ReduceMax", [f"attended.{i}"], [f"attended.{i}.top"], keepdims=0),
        ]
        tops.append(f"attended.{i}.top")
    return [*nodes, onnx.helper.make_node("Max", tops, [f"tap.{LARGEST}"])]
