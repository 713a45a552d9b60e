"""The decoder graph of an architecture: embedding, blocks and output layer. Linear layers have adapter slots.

A pass has a batch of sequences and s new tokens of each; those of a sequence with fewer are followed by any others. The
inputs are `input_ids` (batch, s) int64; `query_seqlens` (batch,) int32, the new tokens of each sequence and one more,
as attention gets one more row; `seqlens_k` (batch,) int32, all tokens of each; `total_sequence_length` () int32, the
most of those and one more; `logits_at` (n,) int64, which of the batch s rows get logits; a cache of keys and of values
for each layer, with room for one token more; and for LongRoPE `long_context` (1,) int64 (default 0).

Every linear module that a LoRA adapter may target has two optional inputs, `layers.<i>.<module>.A` (blends, 1, r, in)
and `layers.<i>.<module>.B` (blends, 1, r, out), whose default values have rank 0: without feeds the graph computes the
base alone. `slot_layout` (3,) int64 says how tokens meet them: (1, blends, tokens of each blend) is token by token,
(s, 1, 1) all tokens of one sequence at once.

Cosines and sines are computed in each pass, for its positions only: a table of 131,072 positions would take as many
bytes as a small model. `Weights` decides where weights lie, and in which form.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from onnx import TensorProto

from edgecompose.bundle.specs import SlotGroup
from edgecompose.formats.architectures import MODULES
from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.graphs.block import BlockWeights, add_and_norm, write_blocks
from edgecompose_export.graphs.writer import GraphWriter


class Weights(BlockWeights, Protocol):
    """The weights that a whole graph reads."""

    def embed(self, graph: GraphWriter, ids: str) -> str:
        """Embeddings (batch, s, hidden) of token ids (batch, s)."""

    def head(self, graph: GraphWriter, hidden: str) -> str:
        """Logits of hidden states."""


def slot_groups(config: DecoderConfig) -> tuple[SlotGroup, ...]:
    """The adapter slots of a decoder."""
    count = len(config.layers)
    return tuple(SlotGroup(m, count, n_in=config.widths[m][1], n_out=config.widths[m][0]) for m in MODULES)


def write_decoder(config: DecoderConfig, weights: Weights, *, slots: bool) -> GraphWriter:
    """The whole graph of a decoder.

    Args:
        slots: whether linear modules have adapter slots.
    """
    graph = GraphWriter("decoder")
    ids = graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    for name, shape in (("seqlens_k", ["batch_size"]), ("total_sequence_length", [])):
        graph.input(name, TensorProto.INT32, shape)
    graph.input("logits_at", TensorProto.INT64, ["kept"])
    hidden = weights.embed(graph, ids)
    if config.embedding_multiplier != 1:
        factor = graph.constant(config.embedding_multiplier, np.float32)
        hidden = graph.node("Mul", [hidden, factor], "embedding/scaled")
    hidden, pending = write_blocks(graph, config, weights, layers=range(len(config.layers)), hidden=hidden, slots=slots)
    hidden, _ = add_and_norm(graph, config, weights, hidden=hidden, pending=pending, norm="final_norm", name="final")
    rows = graph.node("Reshape", [hidden, graph.constant([-1, config.hidden])], "kept/rows")
    kept = graph.node("Gather", [rows, "logits_at"], "kept/hidden", axis=0)
    write_logits(graph, config, weights, hidden=kept)
    return graph


def write_logits(graph: GraphWriter, config: DecoderConfig, weights: Weights, *, hidden: str) -> None:
    """The output layer, the scale and the cap of logits, and the output `logits`."""
    plain = not (config.logit_softcap or config.logit_divisor != 1)
    logits = weights.head(graph, hidden)
    if config.logit_divisor != 1:
        logits = graph.node("Div", [logits, graph.constant(config.logit_divisor, np.float32)], "logits/divided")
    if config.logit_softcap:
        cap = graph.constant(config.logit_softcap, np.float32)
        logits = graph.node("Div", [logits, cap], "logits/in_caps")
        logits = graph.node("Mul", [graph.node("Tanh", [logits], "logits/tanh"), cap], "logits/capped")
    graph.node("Identity", [logits], "logits") if not plain else _rename(graph, logits, "logits")
    graph.output("logits", TensorProto.FLOAT, ["kept", config.vocabulary])


def _rename(graph: GraphWriter, old: str, new: str) -> None:
    """Rename the only output of the last node."""
    node = graph.nodes[-1]
    assert list(node.output) == [old], f"{old} is not the output of the last node"
    node.output[0] = new
