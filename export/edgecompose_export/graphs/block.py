"""The blocks of a decoder graph: attention and MLP, whose linear layers have adapter slots.

What a token gets depends neither on the other sequences of a pass nor on how many of its own tokens a pass has, to the
last bit where weights are quantised. Their products do not depend on the number of rows. Attention does, for one row
alone: other kernels compute it, so every sequence gets one more row, which is dropped again. The products of slots do
too, so `slot_layout` has them computed token by token where a pass writes, and together where it reads a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from onnx import TensorProto, numpy_helper

from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.decoder.rotary import Rotary
from edgecompose_export.graphs.writer import MICROSOFT, GraphWriter

#: Modules that read the same input.
INPUT_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class BlockWeights(Protocol):
    """The weights that blocks read."""

    def parameter(self, graph: GraphWriter, tensor: str) -> str:
        """A vector: a norm's weight or bias."""

    def groups(self, layer: int, modules: Sequence[str]) -> list[tuple[str, ...]]:
        """Modules that read the same input, in order, grouped into products."""

    def product(self, graph: GraphWriter, layer: int, modules: Sequence[str], *, source: str, target: str) -> str:
        """The product of one group with its input, the biases added, as `target`."""


def write_blocks(
    graph: GraphWriter,
    config: DecoderConfig,
    weights: BlockWeights,
    *,
    layers: Sequence[int],
    hidden: str,
    slots: bool,
) -> tuple[str, str | None]:
    """Blocks one after another.

    Returns:
        The stream, and the last branch, which the caller adds to the stream.
    """
    _layout(graph, slots=slots)
    rotations = _rotations(graph, config, {config.layers[i].rotary for i in layers})
    pending: str | None = None
    for layer in layers:
        block = _Block(graph, config, weights, layer=layer, slots=slots)
        x, hidden = block.enter(hidden, pending, "attention_in")
        attended = block.leave(block.attention(x, rotations), "attention_out")
        if config.parallel:
            pending = graph.node("Add", [attended, block.mlp(x)], f"{layer}/parallel")
            continue
        x, hidden = block.enter(hidden, attended, "mlp_in")
        pending = block.leave(block.mlp(x), "mlp_out")
    return hidden, pending


class _Block:
    """Writes one block."""

    def __init__(
        self, graph: GraphWriter, config: DecoderConfig, weights: BlockWeights, *, layer: int, slots: bool
    ) -> None:
        self.graph, self.config, self.weights, self.layer, self.slots = graph, config, weights, layer, slots
        self._tokens: dict[str, str] = {}  # the inputs of slots, by those of the modules

    def enter(self, hidden: str, pending: str | None, norm: str) -> tuple[str, str]:
        """Add the pending branch to the stream; return the input of the next part, and the stream."""
        name = f"{self.layer}.{norm}"
        if norm in self.config.norms:
            return add_and_norm(
                self.graph, self.config, self.weights, hidden=hidden, pending=pending, norm=name, name=name
            )
        if pending is not None:
            hidden = self.graph.node("Add", [hidden, pending], f"{name}/stream")
        return hidden, hidden

    def leave(self, branch: str, norm: str) -> str:
        """Norm and scale of a branch, before it is added to the stream."""
        if norm in self.config.norms:
            branch = _norm(self.graph, self.config, self.weights, values=branch, norm=f"{self.layer}.{norm}")
        if self.config.residual_multiplier != 1:
            factor = self.graph.constant(self.config.residual_multiplier, np.float32)
            branch = self.graph.node("Mul", [branch, factor], f"{self.layer}.{norm}/scaled")
        return branch

    def attention(self, x: str, rotations: dict[int, _Rotation]) -> str:
        """Attention with its cache."""
        config, graph, layer = self.config, self.graph, self.layer
        query, key, value = self.linears(("q_proj", "k_proj", "v_proj"), x, extra_row=True)
        query, key = self.normed(query, "q", config.heads), self.normed(key, "k", config.kv_heads)
        rotary = config.layers[layer].rotary
        if rotary is not None:
            query = self.rotated(query, "q", heads=config.heads, rotation=rotations[rotary])
            key = self.rotated(key, "k", heads=config.kv_heads, rotation=rotations[rotary])
        caches = []
        for part in ("key", "value"):
            shape: list[int | str] = ["batch_size", config.kv_heads, "past_length", config.head_size]
            caches.append(graph.input(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, shape))
            shape = ["batch_size", config.kv_heads, "present_length", config.head_size]
            graph.output(f"present.{layer}.{part}", TensorProto.FLOAT, shape)
        attributes: dict[str, int | float] = {
            "num_heads": config.heads,
            "kv_num_heads": config.kv_heads,
            "scale": config.attention_scale,
        }
        window = config.layers[layer].window
        if window is not None and window < config.context:
            attributes["local_window_size"] = window
        if config.attention_softcap:
            attributes["softcap"] = config.attention_softcap
        attended, *_ = graph.nodes_of(
            "GroupQueryAttention",
            [query, key, value, *caches, "seqlens_k", "total_sequence_length", *[""] * 9, "query_seqlens"],
            [f"{layer}.attention", f"present.{layer}.key", f"present.{layer}.value"],
            domain=MICROSOFT,
            **attributes,
        )
        first, last, axis = (graph.constant([number]) for number in (0, -1, 1))
        attended = graph.node("Slice", [attended, first, last, axis], f"{layer}.attended")
        return self.linears(("o_proj",), attended)[0]

    def normed(self, values: str, name: str, heads: int) -> str:
        """Queries or keys with their norm, where the architecture has one."""
        config, graph = self.config, self.graph
        kind, tensor = config.architecture.query_key_norm, f"{self.layer}.{name}_norm"
        if kind == "none":
            return values
        if kind == "head":
            shape = graph.constant([0, 0, heads, config.head_size])
            values = graph.node("Reshape", [values, shape], f"{tensor}/heads")
        values = _norm(graph, config, self.weights, values=values, norm=tensor)
        if kind == "head":
            shape = graph.constant([0, 0, heads * config.head_size])
            values = graph.node("Reshape", [values, shape], f"{tensor}/joined")
        return values

    def rotated(self, values: str, name: str, *, heads: int, rotation: _Rotation) -> str:
        """Queries or keys with their rotary embedding."""
        rotary = self.config.rotaries[self.config.layers[self.layer].rotary or 0]
        partial = 2 * rotary.pairs if 2 * rotary.pairs < self.config.head_size else 0
        return self.graph.node(
            "RotaryEmbedding",
            [values, ROW_NUMBERS, *rotation],
            f"{self.layer}.{name}_turned",
            domain=MICROSOFT,
            num_heads=heads,
            rotary_embedding_dim=partial,
        )

    def mlp(self, x: str) -> str:
        """The gated MLP."""
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

    def linears(self, modules: Sequence[str], x: str, *, extra_row: bool = False) -> list[str]:
        """The outputs of linear modules that read the same input, with their adapters.

        Args:
            extra_row: repeat the last row.
        """
        outputs: list[str] = []
        if self.slots and x not in self._tokens:  # where blocks are parallel, attention and MLP read the same input
            self._tokens[x] = self.graph.node("Reshape", [x, TOKENS], f"{x}/tokens")
        for group in self.weights.groups(self.layer, modules):
            target = f"{self.layer}.{'+'.join(group)}"
            base = f"{target}/base" if self.slots else target
            product = self.weights.product(self.graph, self.layer, group, source=x, target=base)
            if self.slots:
                deltas = [self.delta(module, self._tokens[x]) for module in group]
                delta = (
                    deltas[0] if len(deltas) == 1 else self.graph.node("Concat", deltas, f"{target}/deltas", axis=-1)
                )
                delta = self.graph.node("Reshape", [delta, ROWS], f"{target}/delta")
                product = self.graph.node("Add", [product, delta], target)
            if extra_row:
                product = self.graph.node("Gather", [product, EXTENDED], f"{target}/extended", axis=1)
            if len(group) == 1:
                outputs.append(product)
                continue
            sizes = self.graph.constant([self.config.widths[module][0] for module in group])
            names = [f"{self.layer}.{module}" for module in group]
            outputs += self.graph.nodes_of("Split", [product, sizes], names, axis=-1)
        return outputs

    def delta(self, module: str, tokens: str) -> str:
        """The output of the adapters in a slot: x A^T B, with the blend of each sequence or of all."""
        n_out, n_in = self.config.widths[module]
        slot = f"layers.{self.layer}.{module}"
        for side, width in (("A", n_in), ("B", n_out)):
            name = self.graph.input(f"{slot}.{side}", TensorProto.FLOAT, ["blends", 1, f"{module}_rank", width])
            self.graph.tensor(numpy_helper.from_array(np.zeros((1, 1, 0, width), np.float32), name))
        # transBatchA: the first axis of the left side is that of the rows, those between are those of the batch
        matmul = functools.partial(self.graph.node, "FusedMatMul", domain=MICROSOFT, transBatchA=1)
        down = matmul([tokens, f"{slot}.A"], f"{slot}/down", transB=1)
        turned = self.graph.node("Reshape", [down, RANKS], f"{slot}/tokens")
        return matmul([turned, f"{slot}.B"], f"{slot}/up")


#: What all blocks read of a pass: the numbers of its rows (s + 1), of which the last is repeated; the numbers of all
#: rows (batch, s + 1); the shapes of the input of slots, of what is between A and B, and of hidden states.
EXTENDED, ROW_NUMBERS, TOKENS, RANKS, ROWS = (
    f"pass/{name}" for name in ("extended", "row_numbers", "tokens", "ranks", "rows")
)
_Rotation = tuple[str, str]


def _layout(graph: GraphWriter, *, slots: bool) -> None:
    """The nodes that all blocks read of a pass."""
    graph.input("query_seqlens", TensorProto.INT32, ["batch_size"])
    zero, one, minus_one = graph.constant(0), graph.constant(1), graph.constant([-1])
    length = graph.node("Shape", ["input_ids"], "pass/length", start=1, end=2)
    count = graph.node("Squeeze", [length], "pass/count")
    numbers = graph.node("Range", [zero, count, one], "pass/numbers")
    last = graph.node("Add", [length, minus_one], "pass/last")
    graph.node("Concat", [numbers, last], EXTENDED, axis=0)
    if slots:
        graph.input("slot_layout", TensorProto.INT64, [3])
        graph.node("Concat", ["slot_layout", minus_one], TOKENS, axis=0)
        graph.node("Concat", ["slot_layout", graph.constant([0])], RANKS, axis=0)
        shape = graph.node("Shape", ["input_ids"], "pass/shape")
        graph.node("Concat", [shape, minus_one], ROWS, axis=0)


def _rotations(graph: GraphWriter, config: DecoderConfig, used: set[int | None]) -> dict[int, _Rotation]:
    """Cosines and sines (batch (s + 1), pairs) of each rotation, for the positions of this pass."""
    indices = sorted(index for index in used if index is not None)
    if not indices:
        return {}
    one, column = graph.constant(1), graph.constant([-1, 1])
    before = graph.node("Sub", ["seqlens_k", "query_seqlens"], "positions/before")  # one less than tokens in the cache
    wide = graph.node("Cast", [before], "positions/before64", to=TensorProto.INT64)
    first = graph.node("Reshape", [wide, column], "positions/first")
    end = graph.node("Add", ["pass/count", graph.constant(2)], "positions/end")
    steps = graph.node("Range", [one, end, one], "positions/steps")
    positions = graph.node("Add", [first, steps], "positions/all")
    size = graph.node("Size", [positions], "positions/size")
    numbers = graph.node("Range", [graph.constant(0), size, one], "positions/numbers")
    graph.node("Reshape", [numbers, graph.node("Shape", [positions], "positions/shape")], ROW_NUMBERS)
    floats = graph.node("Cast", [positions], "positions/floats", to=TensorProto.FLOAT)
    rows = graph.node("Reshape", [floats, column], "positions/column")
    return {index: _rotation(graph, config.rotaries[index], index=index, positions=rows) for index in indices}


def _rotation(graph: GraphWriter, rotary: Rotary, *, index: int, positions: str) -> _Rotation:
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
    rotation = []
    for op in ("Cos", "Sin"):
        values = graph.node(op, [angles], f"{prefix}/{op.lower()}")
        if rotary.scale != 1:
            factor = graph.constant(rotary.scale, np.float32)
            values = graph.node("Mul", [values, factor], f"{prefix}/{op.lower()}_scaled")
        rotation.append(values)
    return rotation[0], rotation[1]


def add_and_norm(
    graph: GraphWriter,
    config: DecoderConfig,
    weights: BlockWeights,
    *,
    hidden: str,
    pending: str | None,
    norm: str,
    name: str,
) -> tuple[str, str]:
    """Add the pending branch to the stream; return the norm of the sum, and the sum."""
    if pending is None:
        return _norm(graph, config, weights, values=hidden, norm=norm), hidden
    if config.architecture.norm == "layer":
        hidden = graph.node("Add", [hidden, pending], f"{name}/stream")
        return _norm(graph, config, weights, values=hidden, norm=norm), hidden
    weight = weights.parameter(graph, f"{norm}.weight")
    normed, *_, total = graph.nodes_of(
        "SkipSimplifiedLayerNormalization",
        [hidden, pending, weight],
        [f"{name}/normed", "", "", f"{name}/stream"],
        domain=MICROSOFT,
        epsilon=config.epsilon,
    )
    return normed, total


def _norm(graph: GraphWriter, config: DecoderConfig, weights: BlockWeights, *, values: str, norm: str) -> str:
    weight = weights.parameter(graph, f"{norm}.weight")
    if config.architecture.norm == "layer":
        bias = weights.parameter(graph, f"{norm}.bias")
        return graph.node("LayerNormalization", [values, weight, bias], f"{norm}/normed", epsilon=config.epsilon)
    return graph.node(
        "SimplifiedLayerNormalization",
        [values, weight],
        f"{norm}/normed",
        axis=-1,
        epsilon=config.epsilon,
        stash_type=1,
    )
