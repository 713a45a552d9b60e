"""Writes the graphs and the data of a base in chosen forms, and compares them with the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgecompose.bundle.specs import BaseSpec, KVGraph
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.memory import release_freed_memory
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import ExportError
from edgecompose.generation.scoring import log_softmax
from edgecompose_export.base.precision import FLOAT_PRECISIONS
from edgecompose_export.base.source import Base
from edgecompose_export.calibration.comparison import Comparison, compare
from edgecompose_export.calibration.logits import float_logits
from edgecompose_export.calibration.mixed_precision import Choice
from edgecompose_export.calibration.reference import FloatStates
from edgecompose_export.calibration.stored import stored_logits, stored_states
from edgecompose_export.graphs.cuda import write_cuda_graph
from edgecompose_export.graphs.decoder import write_decoder
from edgecompose_export.graphs.fuse import write_fuse_graphs
from edgecompose_export.graphs.kv_cache import Bits, write_kv_graph
from edgecompose_export.graphs.stored_weights import StoredWeights
from edgecompose_export.graphs.writer import DataFile
from edgecompose_export.weights.blocks import Float
from edgecompose_export.weights.forms import Form, Quantised

#: Largest query, key or value for which attention is computed in float16 (numbers end at 65504).
LARGEST_HALF = 16384.0
#: Bytes of the largest decoder that is opened as a whole, to compare it with its blocks.
_LARGEST_OPENED = 2_500_000_000
#: KL divergence (nats) between the whole decoder and its blocks that another order of sums explains: in floats, and as
#: a multiple of the divergence of the base, where activations are rounded.
_ROUNDING_KL, _ROUNDING = 1e-5, 4.0
#: Bits of quantised keys and values, and what such a cache is called.
KV_BITS: Mapping[Bits, str] = {8: "int8", 4: "int4"}
#: Largest mean KL divergence (nats) that quantised keys and values may add: twice what all weights of a base may.
LARGEST_KV_KL = 0.02
#: Mixing 4 and 8 bits: the first sum of measured costs, the assumed divergence of 8 bits alone, the share of the limit
#: that is near enough, and the number of attempts after which less is enough.
_FIRST_BUDGET, _FLOOR, _NEAR, _ATTEMPTS = 0.006, 0.002, 0.85, 3
_NO_ADAPTER = MergedAdapter({}, "base")


class BaseWriter:
    """Writes the graphs and the data of one base into a folder, as often as a choice of forms needs it.

    Args:
        reference: the float states of `prompts`.
        advance: called with the name of each step as it begins.
    """

    def __init__(
        self,
        base: Base,
        folder: Path,
        *,
        reference: FloatStates,
        prompts: Sequence[Sequence[int]],
        advance: Callable[[str], None],
    ) -> None:
        self._source, self._folder = base.weights, folder
        self._reference, self._prompts = reference, prompts
        self._advance = advance

    def write(
        self, spec: BaseSpec, forms: Mapping[str, Form], quantised: Mapping[str, Quantised] | None = None
    ) -> tuple[BaseSpec, Comparison]:
        """Write the base in these forms, and compare it with the reference.

        Args:
            forms, quantised: as for `StoredWeights`.

        Returns:
            The description with all graphs, and the comparison.
        """
        source, config = self._source, self._source.config
        self._advance("writing the weights")
        with DataFile(self._folder / f"{spec.graph}.data") as data:
            stored = StoredWeights(source, forms, data, importance=self._reference.importance, quantised=quantised)
            graph = write_decoder(config, stored, slots=True)
            stored.fill()
        graph.save(self._folder / spec.graph)
        if spec.precision in FLOAT_PRECISIONS:
            spec = dataclasses.replace(spec, fusing=write_fuse_graphs(config, stored, self._folder))
        if self._reference.largest <= LARGEST_HALF:
            spec = _write_cuda_graphs(self._folder, spec)
        return spec, self._compare(spec, stored)

    def write_mixed(self, spec: BaseSpec, choice: Choice, *, largest_kl: float) -> tuple[BaseSpec, Comparison]:
        """Write a mix with as many units in 4 bits as stay within `largest_kl`.

        The divergence is nearly linear in the sum of the measured costs. So two attempts and the line through them give
        the budget that reaches the limit.
        """
        budget, attempts = min(_FIRST_BUDGET, choice.cost), [(0.0, _FLOOR)]
        while True:
            described, comparison = self.write(spec, choice.within(budget), choice.quantised)
            kl = comparison.kl
            near = _NEAR * largest_kl <= kl <= largest_kl
            if near or budget == 0 or (kl <= largest_kl and (budget >= choice.cost or len(attempts) > _ATTEMPTS)):
                return described, comparison
            attempts = [*attempts, (budget, kl)]
            (low, low_kl), (high, high_kl) = sorted(attempts)[-2:] if kl < largest_kl else sorted(attempts)[:2]
            slope = max((high_kl - low_kl) / (high - low), 0.1)
            target = (_NEAR + 1) / 2 * largest_kl
            self._advance(f"{kl:.4f} nats: {'fewer' if kl > largest_kl else 'more'} modules in 4 bits")
            budget = min(max(0.0, low + (target - low_kl) / slope), choice.cost)
            if len(attempts) > _ATTEMPTS and kl > largest_kl:
                budget *= 0.8 ** (len(attempts) - _ATTEMPTS)

    def write_kv_graphs(self, spec: BaseSpec) -> dict[str, KVGraph]:
        """Write a decoder for each kind of quantised keys and values that stays near float ones, by its name."""
        reference, graphs = self._reference, {}
        exact = np.concatenate(reference.states)
        for bits, states in reference.kv_states.items():
            name = KV_BITS[bits]
            self._advance(f"measuring keys and values in {bits} bits")
            near = float_logits(self._source, np.concatenate(states))
            kl = compare(float_logits(self._source, exact), near, [-1] * len(exact)).kl
            if not kl <= LARGEST_KV_KL:
                self._advance(f"no {name} cache: {kl:.3f} nats from float caches, expected at most {LARGEST_KV_KL}")
                continue
            graph = write_kv_graph(self._folder / spec.graph, bits, reference.kv_scales[bits])
            graphs[name] = KVGraph(graph, max(0.0, kl))
        return graphs

    def _compare(self, spec: BaseSpec, stored: StoredWeights) -> Comparison:
        """The comparison of the written base with the reference."""
        source, folder = self._source, self._folder
        self._advance("measuring the distance from the values of the file")
        states = stored_states(source, stored, folder, prompts=self._prompts)
        following = [token for prompt in self._prompts for token in (*prompt[1:], -1)]
        exact, near = (np.concatenate(parts) for parts in (self._reference.states, states))
        logits = stored_logits(source.config, stored, folder, states=near)
        comparison = compare(float_logits(source, exact), logits, following)
        release_freed_memory()
        if (folder / f"{spec.graph}.data").stat().st_size <= _LARGEST_OPENED:
            self._check_whole(spec, stored, states[0], limit=max(_ROUNDING_KL, _ROUNDING * comparison.kl))
        return comparison

    def _check_whole(self, spec: BaseSpec, stored: StoredWeights, states: Float, *, limit: float) -> None:
        """Check that the whole decoder computes the same as its blocks one after another.

        Sums may have another order. Where activations are rounded to 8 bits, a different last bit can give another
        code.

        Args:
            states: of the first prompt, from the blocks.
            limit: largest KL divergence (nats) that rounding explains.
        """
        prompt = self._prompts[0]
        chunks = list(stored_logits(self._source.config, stored, self._folder, states=states))
        blockwise = log_softmax(np.concatenate(chunks, -1))
        decoder = Decoder(self._folder / spec.graph, spec, choose_device("cpu"))
        whole = log_softmax(decoder.start(_NO_ADAPTER, len(prompt)).forward(prompt, rows=len(prompt)))
        kl = float((np.exp(blockwise) * (blockwise - whole)).sum(-1).mean())
        if not kl <= limit:
            raise ExportError(
                f"the decoder is {kl:.2g} nats from its own blocks, expected at most {limit:.2g}; "
                "this is an error of edgecompose-export: report it with the name of the base"
            )


def _write_cuda_graphs(output: Path, spec: BaseSpec) -> BaseSpec:
    """Write the decoders for CUDA; return the description with their names."""
    fusing = spec.fusing
    if fusing is not None:
        cuda = write_cuda_graph(output / fusing.decoder_graph)
        fusing = dataclasses.replace(fusing, cuda_decoder_graph=cuda)
    return dataclasses.replace(spec, fusing=fusing, cuda_graph=write_cuda_graph(output / spec.graph))
