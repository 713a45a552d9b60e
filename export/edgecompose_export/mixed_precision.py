"""Which linear modules of a base bear 4 bits: measured, so that the whole stays within a KL divergence.

A block with all its modules in 4 bits changes the stream behind it; that changed stream goes on through the float
blocks above, and the divergence that it ends in is shared out among the block's modules by the squares of what each
alone changes. Small independent errors add up in the divergence, so modules are taken in the order of divergence for
each byte saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecompose_export.decoder_graph import INPUT_GROUPS
from edgecompose_export.layerwise import FloatBlocks, FloatStates, divergences, embedded, final_norm
from edgecompose_export.stored_weights import EIGHT, FOUR, Form, read_form, source_form
from edgecompose_export.weight_source import EMBEDDING, HEAD, WeightSource

Float = npt.NDArray[np.float32]
#: Positions on which sensitivity is measured.
_POSITIONS = 256
#: Rows that are compared to see whether an embedding is the output layer under another quantisation, and how near it is.
_COMPARED_ROWS, _AS_GOOD_AS_EQUAL = 512, 0.1


@dataclass(frozen=True, slots=True)
class Unit:
    """Modules that read the same input, what they save in 4 bits (bytes), and what that costs (nats)."""

    tensors: tuple[str, ...]
    saved: int
    kl: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The forms of 8 bits, and the units that may have 4 instead."""

    forms: Mapping[str, Form]
    units: tuple[Unit, ...]

    def within(self, budget: float) -> dict[str, Form]:
        """Forms with as many units in 4 bits as cost `budget` nats together, the cheapest for each byte first."""
        forms, spent = dict(self.forms), 0.0
        for unit in sorted(self.units, key=lambda unit: unit.kl / unit.saved):
            if spent + unit.kl > budget:
                break
            spent += unit.kl
            forms.update(dict.fromkeys(unit.tensors, FOUR))
        return forms

    def is_smallest(self, budget: float) -> bool:
        """Whether no unit is within a budget, so that a smaller one changes nothing."""
        return all(unit.kl > budget for unit in self.units)


def choose_forms(
    source: WeightSource, prompts: Sequence[Sequence[int]], reference: FloatStates,
    advance: Callable[[int], None] = lambda count: None,
) -> Choice:  # fmt: skip
    """Measure what 4 bits cost each group of modules of a base.

    Args:
        prompts: token ids; the first _POSITIONS positions are used.
        reference: the float states of `prompts`, whose importances the quantisation takes.
        advance: called with 1 behind each block.
    """
    forms = eight_bit_forms(source)
    count = _enough(prompts)
    costs, shares, saved = _measure(source, prompts[:count], forms, reference, advance)
    units = []
    for layer, cost in enumerate(costs):
        whole = sum(shares[layer].values()) or 1.0
        for group, share in shares[layer].items():
            units.append(Unit(group, saved[group], cost * share / whole))
    return Choice(forms, tuple(units))


def eight_bit_forms(source: WeightSource) -> dict[str, Form]:
    """Forms of at most 8 bits: what a file has in 4 bits stays as it is, everything else has blocks of 32."""
    tied = source.config.tied
    names = [f"{i}.{m}.weight" for i in range(len(source.config.layers)) for group in INPUT_GROUPS for m in group]
    forms: dict[str, Form] = {}
    for tensor in [*names, HEAD]:
        own = source_form(source.type_of(EMBEDDING if tensor == HEAD and tied else tensor))
        forms[tensor] = own if not isinstance(own, str) and own.bits == 4 and tensor != HEAD else EIGHT
    if not tied:
        own = source_form(source.type_of(EMBEDDING))
        forms[EMBEDDING] = "shared" if is_head_again(source) else EIGHT if isinstance(own, str) else own
    return forms


def is_head_again(source: WeightSource) -> bool:
    """Whether an embedding holds the output layer's values, but for quantisation."""
    rows = source.config.vocabulary
    picked = np.linspace(0, rows - 1, min(rows, _COMPARED_ROWS)).astype(int)
    first, second = (np.concatenate([source.floats(t, i, i + 1) for i in picked]) for t in (EMBEDDING, HEAD))
    return bool(np.linalg.norm(first - second) <= _AS_GOOD_AS_EQUAL * np.linalg.norm(second))


def _enough(prompts: Sequence[Sequence[int]]) -> int:
    total = 0
    for count, prompt in enumerate(prompts, start=1):
        total += len(prompt)
        if total >= _POSITIONS:
            return count
    return len(prompts)


def _measure(
    source: WeightSource, prompts: Sequence[Sequence[int]], forms: Mapping[str, Form], reference: FloatStates,
    advance: Callable[[int], None],
) -> tuple[npt.NDArray[np.float64], list[dict[tuple[str, ...], float]], dict[tuple[str, ...], int]]:  # fmt: skip
    """For each block the divergence that it ends in, and the square of what each unit changes; bytes saved by unit."""
    blocks, layers = FloatBlocks(source), len(source.config.layers)
    streams = [embedded(source, prompt) for prompt in prompts]
    copies: list[list[Float]] = [[] for _ in prompts]
    shares: list[dict[tuple[str, ...], float]] = []
    saved: dict[tuple[str, ...], int] = {}
    for layer in range(layers):
        weights = blocks.load(layer)
        changed: dict[tuple[str, ...], dict[str, Float]] = {}
        for group in INPUT_GROUPS:
            unit = tuple(t for t in (f"{layer}.{m}.weight" for m in group) if forms[t] == EIGHT and _is_whole(source, t))
            if unit:
                changed[unit] = {t: _four_bits(source, t, reference) for t in unit}
                saved[unit] = sum(_bytes_saved(source, t) for t in unit)
        every = {t: values for unit in changed.values() for t, values in unit.items()}
        shares.append(dict.fromkeys(changed, 0.0))
        for i, stream in enumerate(streams):
            exact = blocks.run(layer, weights, stream)[0]
            for unit, values in changed.items():
                moved = blocks.run(layer, {**weights, **values}, stream)[0]
                shares[-1][unit] += float(np.square(moved - exact).sum(dtype=np.float64))
            if copies[i]:
                together = blocks.run(layer, weights, np.concatenate(copies[i]))[0]
                copies[i] = [together[j : j + 1] for j in range(len(together))]
            copies[i].append(blocks.run(layer, {**weights, **every}, stream)[0])
            streams[i] = exact
        advance(1)
    others = np.stack([
        np.concatenate([final_norm(source, copies[i][layer][0]) for i in range(len(prompts))])
        for layer in range(layers)
    ])  # fmt: skip
    exact = np.concatenate(reference.states[: len(prompts)])
    return divergences(source, exact, others), shares, saved


def _is_whole(source: WeightSource, tensor: str) -> bool:
    return source.shape(tensor)[1] % FOUR.block == 0


def _four_bits(source: WeightSource, tensor: str, reference: FloatStates) -> Float:
    rows, width = source.shape(tensor)
    return read_form(source, tensor, FOUR, 0, rows, reference.importance[tensor]).values(width)


def _bytes_saved(source: WeightSource, tensor: str) -> int:
    rows, width = source.shape(tensor)
    eight = EIGHT.blocks(width) * (EIGHT.block + 4)
    return rows * (eight - FOUR.blocks(width) * (FOUR.block // 2 + 4))
