"""The decoder graph of an architecture: embedding, blocks, output layer, with adapter slots where linear layers are.

The graph has the inputs that the decoding loop feeds: `input_ids` (batch, s) int64, `seqlens_k` (batch,) int32 (total
length less one), `total_sequence_length` () int32, `logits_kept` (1,) int64 (default 1: the output layer sees the last
position only), a cache of keys and of values for each layer, and for LongRoPE `long_context` () int64 (default 0).
Every linear module that a LoRA adapter may target has two optional inputs, `layers.<i>.<module>.A` (r, in) and
`layers.<i>.<module>.B` (r, out), whose default values have rank 0: nothing fed means the base alone.

Cosines and sines are computed in each pass, for its positions only: a table of 131,072 positions would take as many
bytes as a small model. Where weights lie, and in what form, is the business of `Weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from onnx import TensorProto, numpy_helper

from edgecompose.bundle.specs import SlotGroup
from edgecompose.formats.architectures import MODULES
from edgecompose_export.decoder_config import DecoderConfig
from edgecompose_export.graph_writer import MICROSOFT, GraphWriter
from edgecompose_export.rotary import Rotary

_LAST = np.iinfo(np.int64).max
#: Modules that read the same input.
INPUT_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class BlockWeights(Protocol):
    """What blocks read their weights from."""

    def parameter(self, graph: GraphWriter, tensor: str) -> str:
        """A vector: a norm's weight or bias."""

    def groups(self, layer: int, modules: Sequence[str]) -> list[tuple[str, ...]]:
        """Modules that read the same input, in order, grouped into products."""

    def product(self, graph: GraphWriter, layer: int, modules: Sequence[str], source: str, target: str) -> str:
        """The product of one group with its input, the biases added, as `target`."""


class Weights(BlockWeights, Protocol):
    """What a whole graph reads its weights from."""

    def embed(self, graph: GraphWriter, ids: str) -> str:
        """Embeddings (batch, s, hidden) of token ids (batch, s)."""

    def head(self, graph: GraphWriter, hidden: str) -> str:
        """Logits of hidden states."""


def slot_groups(config: DecoderConfig) -> tuple[SlotGroup, ...]:
    """The adapter slots of a decoder."""
    count = len(config.layers)
    return tuple(SlotGroup(m, count, config.widths[m][1], config.widths[m][0]) for m in MODULES)


def write_decoder(config: DecoderConfig, weights: Weights, *, slots: bool) -> GraphWriter:
    """The whole graph of a decoder.

    Args:
        slots: whether linear modules have adapter slots.
    """
    graph = GraphWriter("decoder")
    ids = graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    for name, shape in (("seqlens_k", ["batch_size"]), ("total_sequence_length", [])):
        graph.input(name, TensorProto.INT32, shape)
    graph.input("logits_kept", TensorProto.INT64, [1])
    graph.tensor(numpy_helper.from_array(np.array([1], np.int64), "logits_kept"))
    hidden = weights.embed(graph, ids)
    if config.embedding_multiplier != 1:
        factor = graph.constant(config.embedding_multiplier, np.float32)
        hidden = graph.node("Mul", [hidden, factor], "embedding/scaled")
    hidden, pending = write_blocks(graph, config, weights, range(len(config.layers)), hidden, slots=slots)
    hidden, _ = _add_and_norm(graph, config, weights, hidden, pending, "final_norm", "final")
    start = graph.node("Neg", ["logits_kept"], "last/start")
    last = graph.node("Slice", [hidden, start, graph.constant([_LAST]), graph.constant([1])], "last/hidden")
    write_logits(graph, config, weights, last)
    return graph


def write_logits(graph: GraphWriter, config: DecoderConfig, weights: Weights, hidden: str) -> None:
    """The output layer, what stands behind it, and the output `logits`."""
    plain = not (config.logit_softcap or config.logit_divisor != 1)
    logits = weights.head(graph, hidden)
    if config.logit_divisor != 1:
        logits = graph.node("Div", [logits, graph.constant(config.logit_divisor, np.float32)], "logits/divided")
    if config.logit_softcap:
        cap = graph.constant(config.logit_softcap, np.float32)
        logits = graph.node("Div", [logits, cap], "logits/in_caps")
        logits = graph.node("Mul", [graph.node("Tanh", [logits], "logits/tanh"), cap], "logits/capped")
    graph.node("Identity", [logits], "logits") if not plain else _rename(graph, logits, "logits")
    graph.output("logits", TensorProto.FLOAT, ["batch_size", "kept", config.vocabulary])


def write_blocks(
    graph: GraphWriter, config: DecoderConfig, weights: BlockWeights, layers: Sequence[int], hidden: str, *, slots: bool
) -> tuple[str, str | None]:
    """Blocks one after another.

    Returns:
        The stream, and what is still to be added to it.
    """
    turns = _rotations(graph, config, {config.layers[i].rotary for i in layers})
    pending: str | None = None
    for layer in layers:
        block = _Block(graph, config, weights, layer, slots)
        x, hidden = block.enter(hidden, pending, "attention_in")
        attended = block.leave(block.attention(x, turns), "attention_out")
        if config.parallel:
            pending = graph.node("Add", [attended, block.mlp(x)], f"{layer}/parallel")
            continue
        x, hidden = block.enter(hidden, attended, "mlp_in")
        pending = block.leave(block.mlp(x), "mlp_out")
    return hidden, pending


class _Block:
    """Writes one block."""

    def __init__(
        self, graph: GraphWriter, config: DecoderConfig, weights: BlockWeights, layer: int, slots: bool
    ) -> None:
        self.graph, self.config, self.weights, self.layer, self.slots = graph, config, weights, layer, slots

    def enter(self, hidden: str, pending: str | None, norm: str) -> tuple[str, str]:
        """Add what is pending to the stream; return what the next part reads, and the stream."""
        name = f"{self.layer}.{norm}"
        if norm in self.config.norms:
            return _add_and_norm(self.graph, self.config, self.weights, hidden, pending, name, name)
        if pending is not None:
            hidden = self.graph.node("Add", [hidden, pending], f"{name}/stream")
        return hidden, hidden

    def leave(self, branch: str, norm: str) -> str:
        """What a part adds to the stream."""
        if norm in self.config.norms:
            branch = _norm(self.graph, self.config, self.weights, branch, f"{self.layer}.{norm}")
        if self.config.residual_multiplier != 1:
            factor = self.graph.constant(self.config.residual_multiplier, np.float32)
            branch = self.graph.node("Mul", [branch, factor], f"{self.layer}.{norm}/scaled")
        return branch

    def attention(self, x: str, turns: dict[int, tuple[str, str]]) -> str:
        config, graph, layer = self.config, self.graph, self.layer
        query, key, value = self.linears(("q_proj", "k_proj", "v_proj"), x)
        query, key = self.normed(query, "q", config.heads), self.normed(key, "k", config.kv_heads)
        rotary = config.layers[layer].rotary
        if rotary is not None:
            query = self.turned(query, "q", config.heads, turns[rotary])
            key = self.turned(key, "k", config.kv_heads, turns[rotary])
        caches = []
        for part in ("key", "value"):
            shape: list[int | str] = ["batch_size", config.kv_heads, "past_length", config.head_size]
            caches.append(graph.input(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, shape))
            shape = ["batch_size", config.kv_heads, "present_length", config.head_size]
            graph.output(f"present.{layer}.{part}", TensorProto.FLOAT, shape)
        attributes: dict[str, int | float] = {
            "num_heads": config.heads, "kv_num_heads": config.kv_heads, "scale": config.attention_scale,
        }  # fmt: skip
        window = config.layers[layer].window
        if window is not None and window < config.context:
            attributes["local_window_size"] = window
        if config.attention_softcap:
            attributes["softcap"] = config.attention_softcap
        attended, *_ = graph.nodes_of(
            "GroupQueryAttention", [query, key, value, *caches, "seqlens_k", "total_sequence_length"],
            [f"{layer}.attention", f"present.{layer}.key", f"present.{layer}.value"], domain=MICROSOFT, **attributes,
        )  # fmt: skip
        return self.linears(("o_proj",), attended)[0]

    def normed(self, values: str, name: str, heads: int) -> str:
        config, graph = self.config, self.graph
        kind, tensor = config.architecture.query_key_norm, f"{self.layer}.{name}_norm"
        if kind == "none":
            return values
        if kind == "head":
            shape = graph.constant([0, 0, heads, config.head_size])
            values = graph.node("Reshape", [values, shape], f"{tensor}/heads")
        values = _norm(graph, config, self.weights, values, tensor)
        if kind == "head":
            shape = graph.constant([0, 0, heads * config.head_size])
            values = graph.node("Reshape", [values, shape], f"{tensor}/joined")
        return values

    def turned(self, values: str, name: str, heads: int, turn: tuple[str, str]) -> str:
        rotary = self.config.rotaries[self.config.layers[self.layer].rotary or 0]
        partial = 2 * rotary.pairs if 2 * rotary.pairs < self.config.head_size else 0
        return self.graph.node(
            "RotaryEmbedding", [values, self.graph.constant([0]), *turn], f"{self.layer}.{name}_turned",
            domain=MICROSOFT, num_heads=heads, rotary_embedding_dim=partial,
        )  # fmt: skip

    def mlp(self, x: str) -> str:
        gate, up = self.linears(("gate_proj", "up_proj"), x)
        name = f"{self.layer}.gate_active"
        match self.config.activation:
            case "silu":
                gate = self.graph.node("QuickGelu", [gate], name, domain=MICROSOFT, alpha=1.0)
            case "gelu":
                gate = self.graph.node("Gelu", [gate], name, approximate="none")
            case "gelu_tanh":
                gate = self.graph.node("Gelu", [gate], name, approximate="tanh")
        return self.linears(("down_proj",), self.graph.node("Mul", [gate, up], f"{self.layer}.gated"))[0]

    def linears(self, modules: Sequence[str], x: str) -> list[str]:
        """The outputs of linear modules that read the same input, with their adapters."""
        outputs: list[str] = []
        for group in self.weights.groups(self.layer, modules):
            target = f"{self.layer}.{'+'.join(group)}"
            product = self.weights.product(self.graph, self.layer, group, x, f"{target}/base" if self.slots else target)
            if self.slots:
                deltas = [self.delta(module, x) for module in group]
                delta = deltas[0] if len(deltas) == 1 else self.graph.node(
                    "Concat", deltas, f"{target}/deltas", axis=-1
                )  # fmt: skip
                product = self.graph.node("Add", [product, delta], target)
            if len(group) == 1:
                outputs.append(product)
                continue
            sizes = self.graph.constant([self.config.widths[module][0] for module in group])
            names = [f"{self.layer}.{module}" for module in group]
            outputs += self.graph.nodes_of("Split", [product, sizes], names, axis=-1)
        return outputs

    def delta(self, module: str, x: str) -> str:
        """What the adapter in a slot adds: x A^T B."""
        n_out, n_in = self.config.widths[module]
        slot = f"layers.{self.layer}.{module}"
        for side, width in (("A", n_in), ("B", n_out)):
            name = self.graph.input(f"{slot}.{side}", TensorProto.FLOAT, [f"{module}_rank", width])
            self.graph.tensor(numpy_helper.from_array(np.zeros((0, width), np.float32), name))
        down = self.graph.node("FusedMatMul", [x, f"{slot}.A"], f"{slot}/down", domain=MICROSOFT, transB=1)
        return self.graph.node("MatMul", [down, f"{slot}.B"], f"{slot}/up")


def _rotations(graph: GraphWriter, config: DecoderConfig, used: set[int | None]) -> dict[int, tuple[str, str]]:
    """Cosines and sines (s, pairs) of each rotation, at the positions of this pass."""
    indices = sorted(index for index in used if index is not None)
    if not indices:
        return {}
    length = graph.node("Shape", ["input_ids"], "positions/length", start=1, end=2)
    scalar = graph.node("Squeeze", [length], "positions/count")
    end = graph.node("Cast", ["total_sequence_length"], "positions/end", to=TensorProto.INT64)
    start = graph.node("Sub", [end, scalar], "positions/start")
    numbers = graph.node("Range", [start, end, graph.constant(1)], "positions/numbers")
    floats = graph.node("Cast", [numbers], "positions/floats", to=TensorProto.FLOAT)
    column = graph.node("Unsqueeze", [floats, graph.constant([-1])], "positions/column")
    return {index: _rotation(graph, config.rotaries[index], index, column) for index in indices}


def _rotation(graph: GraphWriter, rotary: Rotary, index: int, positions: str) -> tuple[str, str]:
    prefix = f"rotary.{index}"
    if rotary.long_frequencies is None:
        frequencies = graph.tensor(numpy_helper.from_array(rotary.frequencies[None], f"{prefix}/frequencies"))
    else:
        both = np.stack([rotary.frequencies, rotary.long_frequencies])
        if "long_context" not in graph.inputs:
            graph.input("long_context", TensorProto.INT64, [1])
            graph.tensor(numpy_helper.from_array(np.zeros(1, np.int64), "long_context"))
        table = graph.tensor(numpy_helper.from_array(both, f"{prefix}/both"))
        frequencies = graph.node("Gather", [table, "long_context"], f"{prefix}/frequencies", axis=0)
    angles = graph.node("Mul", [positions, frequencies], f"{prefix}/angles")
    turn = []
    for op in ("Cos", "Sin"):
        values = graph.node(op, [angles], f"{prefix}/{op.lower()}")
        if rotary.scale != 1:
            factor = graph.constant(rotary.scale, np.float32)
            values = graph.node("Mul", [values, factor], f"{prefix}/{op.lower()}_scaled")
        turn.append(values)
    return turn[0], turn[1]


def _add_and_norm(
    graph: GraphWriter,
    config: DecoderConfig,
    weights: BlockWeights,
    hidden: str,
    pending: str | None,
    norm: str,
    name: str,
) -> tuple[str, str]:
    """The stream with what is pending added to it, and its norm; returns the norm first."""
    if pending is None:
        return _norm(graph, config, weights, hidden, norm), hidden
    if config.architecture.norm == "layer":
        hidden = graph.node("Add", [hidden, pending], f"{name}/stream")
        return _norm(graph, config, weights, hidden, norm), hidden
    weight = weights.parameter(graph, f"{norm}.weight")
    normed, *_, total = graph.nodes_of(
        "SkipSimplifiedLayerNormalization", [hidden, pending, weight], [f"{name}/normed", "", "", f"{name}/stream"],
        domain=MICROSOFT, epsilon=config.epsilon,
    )  # fmt: skip
    return normed, total


def _norm(graph: GraphWriter, config: DecoderConfig, weights: BlockWeights, values: str, norm: str) -> str:
    weight = weights.parameter(graph, f"{norm}.weight")
    if config.architecture.norm == "layer":
        bias = weights.parameter(graph, f"{norm}.bias")
        return graph.node("LayerNormalization", [values, weight, bias], f"{norm}/normed", epsilon=config.epsilon)
    return graph.node(
        "SimplifiedLayerNormalization", [values, weight], f"{norm}/normed", axis=-1, epsilon=config.epsilon,
        stash_type=1,
    )  # fmt: skip


def _rename(graph: GraphWriter, old: str, new: str) -> None:
    """Give the last node's only output another name."""
    node = graph.nodes[-1]
    assert list(node.output) == [old], f"{old} is not what the last node gives"
    node.output[0] = new
