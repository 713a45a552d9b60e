"""A decoder run block by block over whole prompts, so that one block at a time is in memory.

Twice: on the float values of a base's own file (the reference that nothing of the stored forms enters), and on the
stored weights with the kernels that decode with them. `compare` brings both together. Blocks are small ONNX graphs of
the same architecture row; those of the reference read their weights from inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from edgecompose.engine.device import Device, Session, choose_device, open_session
from edgecompose.errors import ExportError
from edgecompose_export.decoder_config import DecoderConfig
from edgecompose_export.decoder_graph import INPUT_GROUPS, BlockWeights, Weights, write_blocks
from edgecompose_export.graph_writer import MICROSOFT, GraphWriter
from edgecompose_export.weight_source import EMBEDDING, FINAL_NORM, HEAD, WeightSource

Float = npt.NDArray[np.float32]
#: Logits that are computed at once, and rows of the output layer for them at least.
_LOGITS, _FEWEST_ROWS = 1 << 23, 1 << 11
#: The tap of the largest query, key or value (as a number of any sign).
LARGEST = "largest"
#: Module -> the name of what it reads, among the taps of a block.
TAPS: Mapping[str, str] = {module: group[0] for group in INPUT_GROUPS for module in group}


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Two models on the same positions, in nats: mean KL divergence of the second from the first, mean negative
    log-likelihood of the next token under each, and how often both have the same likeliest token.
    """

    kl: float
    top1: float
    nll: float
    nll_other: float
    positions: int


class FedWeights:
    """Weights that blocks take as inputs, float32, each module by itself."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config
        self.taps: dict[str, str] = {}

    def parameter(self, graph: GraphWriter, tensor: str) -> str:
        """As `BlockWeights` has it."""
        return graph.input(tensor, TensorProto.FLOAT, [f"size of {tensor}"])

    def groups(self, layer: int, modules: Sequence[str]) -> list[tuple[str, ...]]:
        """Each module by itself."""
        return [(module,) for module in modules]

    def product(self, graph: GraphWriter, layer: int, modules: Sequence[str], source: str, target: str) -> str:
        """As `BlockWeights` has it."""
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
    """The float reference: reads a block's weights from the source and runs them."""

    def __init__(self, source: WeightSource, device: Device | None = None) -> None:
        self._source, self._config = source, source.config
        self._device = device or choose_device("cpu")
        self._sessions: dict[object, tuple[Session, int, list[str]]] = {}

    def load(self, layer: int) -> dict[str, Float]:
        """The weights of a block, by tensor."""
        session, example, _ = self._session(layer)
        prefix = f"{example}."
        names = [i.name.removeprefix(prefix) for i in session.get_inputs() if i.name.startswith(prefix)]
        return {f"{layer}.{name}": self._source.floats(f"{layer}.{name}") for name in names}

    def run(
        self, layer: int, weights: Mapping[str, Float], hidden: Float, *, taps: bool = False
    ) -> tuple[Float, dict[str, Float]]:
        """The stream behind a block.

        Args:
            weights: as `load` gives them, or others of the same shapes.
            hidden: the stream before it, (batch, s, hidden), from position 0.
            taps: return also what linear modules read, by the names in TAPS.
        """
        session, example, tapped = self._session(layer)
        feeds = _sequence_feeds(self._config, example, hidden)
        feeds |= {f"{example}.{name.split('.', 1)[1]}": values for name, values in weights.items()}
        names = ["hidden_out", *(f"tap.{name}" for name in tapped)] if taps else ["hidden_out"]
        results = session.run(names, feeds)
        return results[0], dict(zip(tapped, results[1:], strict=True)) if taps else {}

    def _session(self, layer: int) -> tuple[Session, int, list[str]]:
        """A session for blocks like this one, the block that it was written for, and its taps."""
        kind = self._config.layers[layer]
        if kind not in self._sessions:
            weights = FedWeights(self._config)
            model = _block_model(self._config, weights, [layer])
            taps = dict(weights.taps)
            for name, value in taps.items():
                model.graph.node.append(onnx.helper.make_node("Identity", [value], [f"tap.{name}"]))
            model.graph.node.extend(_largest_attended(model.graph))
            for name in (*taps, LARGEST):
                model.graph.output.append(onnx.helper.make_tensor_value_info(f"tap.{name}", TensorProto.FLOAT, None))
            session = _open(model, None, self._device)
            self._sessions[kind] = (session, layer, [*taps, LARGEST])
        return self._sessions[kind]


@dataclass(frozen=True, slots=True, eq=False)
class FloatStates:
    """A run of the reference.

    Attributes:
        states: what the output layer reads, (s, hidden) for each prompt.
        largest: the largest query, key or value on the way.
        importance: for the weight of each linear module the mean square of its input, (n_in,).
    """

    states: list[Float]
    largest: float
    importance: Mapping[str, Float]


def float_states(
    source: WeightSource, prompts: Sequence[Sequence[int]], advance: Callable[[int], None] = lambda count: None
) -> FloatStates:
    """Hidden states of prompts from the float values of a base's file.

    Args:
        advance: called with 1 behind each block.
    """
    blocks, largest, importance = FloatBlocks(source), 0.0, {}
    streams = [embedded(source, prompt) for prompt in prompts]
    for layer in range(len(source.config.layers)):
        weights = blocks.load(layer)
        runs = [blocks.run(layer, weights, stream, taps=True) for stream in streams]
        streams = _all_finite([stream for stream, _ in runs], f"layer {layer} of base '{source.name}'")
        largest = max(largest, *(float(taps[LARGEST].max()) for _, taps in runs))
        for module, tap in TAPS.items():
            squares = np.mean([np.square(taps[tap]).mean((0, 1)) for _, taps in runs], axis=0)
            importance[f"{layer}.{module}.weight"] = squares.astype(np.float32)
        advance(1)
    return FloatStates([final_norm(source, stream[0]) for stream in streams], largest, importance)


def stored_states(
    source: WeightSource, weights: Weights, folder: Path, prompts: Sequence[Sequence[int]],
    advance: Callable[[int], None] = lambda count: None,
) -> list[Float]:  # fmt: skip
    """The same, computed with stored weights.

    Args:
        weights: those of a decoder that was written to `folder`.
        advance: called with 1 behind each block.
    """
    config, device = source.config, choose_device("cpu")
    streams = [stream[None] for stream in _stored_embeddings(config, weights, folder, device, prompts)]
    for layer in range(len(config.layers)):
        session = _open(_block_model(config, weights, [layer]), folder, device)
        streams = [session.run(["hidden_out"], _sequence_feeds(config, layer, stream))[0] for stream in streams]
        _all_finite(streams, f"layer {layer} as it is stored of base '{source.name}'")
        del session
        advance(1)
    return [final_norm(source, stream[0]) for stream in streams]


def _all_finite(streams: list[Float], what: str) -> list[Float]:
    if not all(np.isfinite(stream).all() for stream in streams):
        raise ExportError(f"{what} gives numbers that are not finite; its weights are damaged, copy it again")
    return streams


def embedded(source: WeightSource, ids: Sequence[int]) -> Float:
    """Embeddings (1, s, hidden) of token ids, scaled as the architecture has it."""
    rows = np.concatenate([source.floats(EMBEDDING, i, i + 1) for i in ids])
    return (rows * np.float32(source.config.embedding_multiplier))[None]


def final_norm(source: WeightSource, values: Float) -> Float:
    """The norm before the output layer, in float64 arithmetic."""
    config, wide = source.config, values.astype(np.float64)
    if config.architecture.norm == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + config.epsilon) * source.floats(FINAL_NORM)
    if config.architecture.norm == "layer":
        wide = wide + source.floats(FINAL_NORM.replace("weight", "bias"))
    return np.asarray(wide, np.float32)


def float_logits(source: WeightSource, states: Float) -> Iterator[Float]:
    """Logits of hidden states (n, hidden) from the float values of the file, vocabulary chunk by chunk: (n, chunk)."""
    tensor = EMBEDDING if source.config.tied else HEAD
    for start, stop in _vocabulary_chunks(source.config, len(states)):
        yield finished(source.config, states @ source.floats(tensor, start, stop).T)


def stored_logits(config: DecoderConfig, weights: Weights, folder: Path, states: Float) -> Iterator[Float]:
    """Logits of hidden states from a stored output layer, in the same chunks as `float_logits`."""
    graph = GraphWriter("head")
    hidden = graph.input("hidden", TensorProto.FLOAT, ["batch", "s", config.hidden])
    product = weights.head(graph, hidden)
    whole = graph.model()
    device = choose_device("cpu")
    for start, stop in _vocabulary_chunks(config, len(states)):
        session = _open(_head_rows(whole, product, config.vocabulary, start, stop), folder, device)
        yield finished(config, session.run([product], {"hidden": states[None]})[0][0])


def finished(config: DecoderConfig, logits: Float) -> Float:
    """What stands behind the output layer."""
    logits = logits / np.float32(config.logit_divisor)
    cap = np.float32(config.logit_softcap)
    return cap * np.tanh(logits / cap) if cap else logits


def compare(one: Iterable[Float], other: Iterable[Float], following: Sequence[int]) -> Comparison:
    """Distributions of two models over the vocabulary, which comes in chunks.

    Args:
        one, other: chunks (n, c) of logits, in the order of token ids.
        following: for each of the n positions the id of the next token, -1 where there is none.
    """
    targets = np.asarray(following)
    sums = [_Running(len(targets)), _Running(len(targets))]
    cross = np.zeros(len(targets))
    reference = np.full(len(targets), -np.inf)
    start = 0
    for p, q in zip(one, other, strict=True):
        # sum of exp(p) (p - q), kept relative to the largest p so far
        top = np.maximum(reference, p.max(-1))
        cross = cross * np.exp(reference - top) + (np.exp(p - top[:, None]) * (p - q)).sum(-1, dtype=np.float64)
        reference = top
        for running, logits in zip(sums, (p, q), strict=True):
            running.add(logits, start, targets)
        start += p.shape[1]
    first, second = sums
    kl = cross / np.exp(first.log_total - reference) - first.log_total + second.log_total
    has_next = targets >= 0
    return Comparison(
        kl=float(kl.mean()), top1=float((first.best == second.best).mean()), nll=first.loss(has_next),
        nll_other=second.loss(has_next), positions=len(targets),
    )  # fmt: skip


def divergences(source: WeightSource, reference: Float, others: Float) -> npt.NDArray[np.float64]:
    """Mean KL divergence (nats) of several models' next-token distributions from the reference's.

    Args:
        reference: hidden states (n, hidden) that the output layer reads.
        others: (models, n, hidden).
    """
    models, count, hidden = others.shape
    flat = others.reshape(-1, hidden)
    targets = np.full(count, -1)
    sums = [_Running(count) for _ in range(models + 1)]
    cross, top = np.zeros((models, count)), np.full(count, -np.inf)
    tensor = EMBEDDING if source.config.tied else HEAD
    for start, stop in _vocabulary_chunks(source.config, len(flat)):
        rows = source.floats(tensor, start, stop).T
        p, q = (finished(source.config, states @ rows) for states in (reference, flat))
        raised = np.maximum(top, p.max(-1))
        weights = np.exp(p - raised[:, None])
        for i, logits in enumerate(q.reshape(models, count, -1)):
            cross[i] = cross[i] * np.exp(top - raised) + (weights * (p - logits)).sum(-1, dtype=np.float64)
            sums[i].add(logits, 0, targets)
        sums[-1].add(p, 0, targets)
        top = raised
    own = sums[-1].log_total
    totals = np.stack([running.log_total for running in sums[:-1]])
    return np.asarray((cross / np.exp(own - top) - own + totals).mean(-1))


class _Running:
    """Log of the sum of exponentials, best token, and logit of the target, over chunks of a vocabulary."""

    def __init__(self, count: int) -> None:
        self.best = np.zeros(count, np.int64)
        self._top = np.full(count, -np.inf)
        self._sum = np.zeros(count)
        self._target = np.zeros(count)

    def add(self, logits: Float, start: int, targets: npt.NDArray[np.int64]) -> None:
        top = np.maximum(self._top, logits.max(-1))
        self.best = np.where(top > self._top, logits.argmax(-1) + start, self.best)
        self._sum = self._sum * np.exp(self._top - top) + np.exp(logits - top[:, None]).sum(-1, dtype=np.float64)
        self._top = top
        inside = np.flatnonzero((targets >= start) & (targets < start + logits.shape[1]))
        self._target[inside] = logits[inside, targets[inside] - start]

    @property
    def log_total(self) -> npt.NDArray[np.float64]:
        return self._top + np.log(self._sum)

    def loss(self, has_next: npt.NDArray[np.bool_]) -> float:
        return float((self.log_total - self._target)[has_next].mean()) if has_next.any() else 0.0


def _vocabulary_chunks(config: DecoderConfig, positions: int) -> Iterator[tuple[int, int]]:
    step = max(_FEWEST_ROWS, _LOGITS // positions)
    for start in range(0, config.vocabulary, step):
        yield start, min(start + step, config.vocabulary)


def _block_model(config: DecoderConfig, weights: BlockWeights, layers: Sequence[int]) -> onnx.ModelProto:
    """Blocks without slots: `hidden_in` to `hidden_out` (batch, s, hidden)."""
    graph = GraphWriter("blocks")
    hidden = graph.input("hidden_in", TensorProto.FLOAT, ["batch_size", "sequence_length", config.hidden])
    graph.input("seqlens_k", TensorProto.INT32, ["batch_size"])
    graph.input("total_sequence_length", TensorProto.INT32, [])
    ids = graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    graph.node("Identity", [ids], "ids_seen")  # its length alone is read, and only where layers turn
    stream, pending = write_blocks(graph, config, weights, layers, hidden, slots=False)
    assert pending is not None
    graph.node("Add", [stream, pending], "hidden_out")
    graph.output("hidden_out", TensorProto.FLOAT, ["batch_size", "sequence_length", config.hidden])
    return graph.model()


def _largest_attended(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that give the largest absolute value that attention reads."""
    attention = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    nodes, tops = [], []
    for i, value in enumerate(attention.input[:3]):
        nodes += [
            onnx.helper.make_node("Abs", [value], [f"attended.{i}"]),
            onnx.helper.make_node("ReduceMax", [f"attended.{i}"], [f"attended.{i}.top"], keepdims=0),
        ]
        tops.append(f"attended.{i}.top")
    return [*nodes, onnx.helper.make_node("Max", tops, [f"tap.{LARGEST}"])]


def _sequence_feeds(config: DecoderConfig, layer: int, hidden: Float) -> dict[str, npt.NDArray[np.generic]]:
    batch, length, _ = hidden.shape
    empty = np.zeros((batch, config.kv_heads, 0, config.head_size), np.float32)
    feeds: dict[str, npt.NDArray[np.generic]] = {
        "hidden_in": hidden, "seqlens_k": np.full(batch, length - 1, np.int32),
        "total_sequence_length": np.array(length, np.int32), "input_ids": np.zeros((batch, length), np.int64),
        f"past_key_values.{layer}.key": empty, f"past_key_values.{layer}.value": empty,
    }  # fmt: skip
    return feeds


def _stored_embeddings(
    config: DecoderConfig, weights: Weights, folder: Path, device: Device, prompts: Sequence[Sequence[int]]
) -> list[Float]:
    graph = GraphWriter("embedding")
    rows = weights.embed(graph, graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]))
    graph.output(rows, TensorProto.FLOAT, ["batch_size", "sequence_length", config.hidden])
    session = _open(graph.model(), folder, device)
    scale = np.float32(config.embedding_multiplier)
    return [session.run([rows], {"input_ids": np.array([prompt], np.int64)})[0][0] * scale for prompt in prompts]


def _head_rows(whole: onnx.ModelProto, product: str, rows: int, start: int, stop: int) -> onnx.ModelProto:
    """A copy of a graph of one product with rows `start` .. `stop` of its weight only."""
    model = onnx.ModelProto.FromString(whole.SerializeToString())
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry for entry in tensor.external_data}
        offset, size = int(entries["offset"].value), int(entries["length"].value)
        tensor.dims[0] = tensor.dims[0] // rows * (stop - start)
        entries["offset"].value = str(offset + size // rows * start)
        entries["length"].value = str(size // rows * (stop - start))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "N":
                attribute.i = stop - start
    model.graph.output.append(onnx.helper.make_tensor_value_info(product, TensorProto.FLOAT, None))
    return model


def _open(model: onnx.ModelProto, folder: Path | None, device: Device) -> Session:
    """A session of a graph in memory, whose tensors lie in the data file of a folder."""
    return open_session(model.SerializeToString(), device, name="block", folder=folder)
