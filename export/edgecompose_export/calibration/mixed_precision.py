"""Mixed precision: chooses the linear modules of a base that get 4 bits, by their measured cost in KL divergence.

A block with all its modules in 4 bits changes the stream after it. The changed stream runs through the remaining float
blocks. The divergence at the end is divided among the block's modules in proportion to the squared change that each
causes alone. Small independent errors add up in the divergence, so modules are taken in the order of divergence for
each byte saved. The 4 bits are those of GPTQ, calibrated on other text than divergences are measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecompose_export.calibration.comparison import divergences
from edgecompose_export.calibration.logits import final_norm
from edgecompose_export.calibration.reference import TAPS, FloatBlocks, FloatStates, embedded
from edgecompose_export.graphs.block import INPUT_GROUPS
from edgecompose_export.weights.blocks import BlockForm, Blocks, Float, packed
from edgecompose_export.weights.forms import EIGHT, Form, Quantised, source_form
from edgecompose_export.weights.gptq import Compensation
from edgecompose_export.weights.places import EMBEDDING, HEAD
from edgecompose_export.weights.source import WeightSource

#: The form of 4 bits: no block sums; scales and zero points take half a bit more than the codes.
FOUR_BITS = BlockForm(4, 32, zeros=True)
#: The form of 8 bits, where rows divide into its blocks. A wider block costs divergence, as activations are rounded in
#: blocks of the same width, but 4 bits cost more for the same number of bytes.
EIGHT_BITS = BlockForm(8, 64)
#: Positions on which sensitivity is measured.
_POSITIONS = 256
#: An embedding is the output layer under another quantisation, if so many rows differ by at most this relative error.
_COMPARED_ROWS, _LARGEST_DIFFERENCE = 512, 0.1


@dataclass(frozen=True, slots=True)
class Unit:
    """Modules that read the same input, the bytes that 4 bits save, and the divergence that they cost (nats)."""

    tensors: tuple[str, ...]
    saved: int
    kl: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The forms of 8 bits, the units that may have 4 bits instead, and the 4-bit weights of these units."""

    forms: Mapping[str, Form]
    units: tuple[Unit, ...]
    quantised: Mapping[str, Quantised]

    def within(self, budget: float) -> dict[str, Form]:
        """Forms with as many units in 4 bits as cost `budget` nats together, the cheapest for each byte first."""
        forms, cost = dict(self.forms), 0.0
        for unit in sorted(self.units, key=lambda unit: unit.kl / unit.saved):
            if cost + unit.kl > budget:
                break
            cost += unit.kl
            forms.update(dict.fromkeys(unit.tensors, FOUR_BITS))
        return forms

    @property
    def cost(self) -> float:
        """Divergence that all units together cost (nats)."""
        return sum(unit.kl for unit in self.units)


def choose_forms(
    source: WeightSource,
    *,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    reference: FloatStates,
    scratch: Path,
    advance: Callable[[int], None] = lambda count: None,
) -> Choice:
    """Quantise all linear modules of a base to 4 bits, and measure the cost of each group of modules.

    Args:
        prompts: token ids that divergence is measured on; the first _POSITIONS positions are used.
        texts: token ids that quantisation is calibrated on.
        reference: the float states of `prompts`.
        scratch: a folder for the 4-bit weights.
        advance: called with 1 after each block.
    """
    forms = eight_bit_forms(source)
    prompts = prompts[: _enough(prompts)]
    blocks, layers = FloatBlocks(source), len(source.config.layers)
    calibration = [embedded(source, text) for text in texts]
    streams = [embedded(source, prompt) for prompt in prompts]
    copies: list[list[Float]] = [[] for _ in prompts]
    shares: list[dict[tuple[str, ...], float]] = []
    quantised: dict[str, Quantised] = {}
    for layer in range(layers):
        weights = blocks.load(layer)
        units = [unit for group in INPUT_GROUPS if (unit := _unit(source, forms, layer=layer, group=group))]
        four, calibration = _quantize_layer(blocks, layer, weights, units=units, calibration=calibration)
        values = {t: rounded.values(source.shape(t)[1]) for t, rounded in four.items()}
        quantised.update({t: _on_disk(rounded, scratch / f"{t}.npz") for t, rounded in four.items()})
        shares.append(dict.fromkeys(units, 0.0))
        for i, stream in enumerate(streams):
            exact = blocks.run(layer, weights, stream)[0]
            for unit in units:
                moved = blocks.run(layer, {**weights, **{t: values[t] for t in unit}}, stream)[0]
                shares[-1][unit] += float(np.square(moved - exact).sum(dtype=np.float64))
            if copies[i]:
                together = blocks.run(layer, weights, np.concatenate(copies[i]))[0]
                copies[i] = [together[j : j + 1] for j in range(len(together))]
            copies[i].append(blocks.run(layer, {**weights, **values}, stream)[0])
            streams[i] = exact
        advance(1)
    costs = divergences(source, np.concatenate(reference.states[: len(prompts)]), _final(source, copies))
    return Choice(forms, _divided_costs(source, costs, shares), quantised)


def eight_bit_forms(source: WeightSource) -> dict[str, Form]:
    """Forms of at most 8 bits: weights that have 4 bits in the file stay unchanged, all others get EIGHT_BITS."""
    tied = source.config.tied
    names = [f"{i}.{m}.weight" for i in range(len(source.config.layers)) for group in INPUT_GROUPS for m in group]
    forms: dict[str, Form] = {}
    for tensor in [*names, HEAD]:
        own = source_form(source.type_of(EMBEDDING if tensor == HEAD and tied else tensor))
        unchanged = not isinstance(own, str) and own.bits == 4 and tensor != HEAD
        forms[tensor] = own if unchanged else _eight_bits(source, EMBEDDING if tensor == HEAD else tensor)
    if not tied:
        own = source_form(source.type_of(EMBEDDING))
        again = is_head_again(source)
        forms[EMBEDDING] = "shared" if again else _eight_bits(source, EMBEDDING) if isinstance(own, str) else own
    return forms


def is_head_again(source: WeightSource) -> bool:
    """Whether an embedding holds the values of the output layer, apart from quantisation errors."""
    rows = source.config.vocabulary
    picked = np.linspace(0, rows - 1, min(rows, _COMPARED_ROWS)).astype(int)
    first, second = (np.concatenate([source.floats(t, i, i + 1) for i in picked]) for t in (EMBEDDING, HEAD))
    return bool(np.linalg.norm(first - second) <= _LARGEST_DIFFERENCE * np.linalg.norm(second))


def _eight_bits(source: WeightSource, tensor: str) -> BlockForm:
    return EIGHT_BITS if source.shape(tensor)[1] % EIGHT_BITS.block == 0 else EIGHT


def _enough(prompts: Sequence[Sequence[int]]) -> int:
    total = 0
    for count, prompt in enumerate(prompts, start=1):
        total += len(prompt)
        if total >= _POSITIONS:
            return count
    return len(prompts)


def _unit(source: WeightSource, forms: Mapping[str, Form], *, layer: int, group: Sequence[str]) -> tuple[str, ...]:
    """The tensors of a group of modules that have 8 bits and could have 4."""
    tensors = (f"{layer}.{module}.weight" for module in group)
    return tuple(t for t in tensors if forms[t] in (EIGHT, EIGHT_BITS) and source.shape(t)[1] % FOUR_BITS.block == 0)


def _quantize_layer(
    blocks: FloatBlocks,
    layer: int,
    weights: Mapping[str, Float],
    *,
    units: Sequence[tuple[str, ...]],
    calibration: Sequence[Float],
) -> tuple[dict[str, Blocks], list[Float]]:
    """The 4-bit weights of a block, and the streams of calibration texts after it."""
    grams: dict[str, Float] = {}
    streams = []
    taps_of = {unit: TAPS[unit[0].split(".")[1]] for unit in units}
    for stream in calibration:
        out, taps = blocks.run(layer, weights, stream, taps=bool(units))
        streams.append(out)
        for tap in taps_of.values():
            inputs = taps[tap].reshape(-1, taps[tap].shape[-1])
            grams[tap] = grams.get(tap, np.float32(0)) + inputs.T @ inputs
    quantised = {}
    for unit in units:
        compensation = Compensation(grams.pop(taps_of[unit]))
        quantised.update({t: compensation.quantize(weights[t], FOUR_BITS.block) for t in unit})
    return quantised, streams


def _on_disk(blocks: Blocks, path: Path) -> Quantised:
    """Write blocks to a file; return a function that reads them back."""
    assert blocks.zeros is not None
    np.savez(path, codes=packed(blocks.codes), scales=blocks.scales, zeros=blocks.zeros)

    def read() -> Blocks:
        with np.load(path) as stored:
            pairs = stored["codes"]
            codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(*pairs.shape[:2], -1)
            return Blocks(4, codes, stored["scales"], zeros=stored["zeros"])

    return read


def _final(source: WeightSource, copies: Sequence[Sequence[Float]]) -> Float:
    """Inputs of the output layer for each changed stream: (blocks, positions, hidden)."""
    return np.stack(
        [
            np.concatenate([final_norm(source, streams[layer][0]) for streams in copies])
            for layer in range(len(source.config.layers))
        ]
    )


def _divided_costs(
    source: WeightSource, costs: npt.NDArray[np.float64], shares: Sequence[Mapping[tuple[str, ...], float]]
) -> tuple[Unit, ...]:
    units = []
    for cost, squares in zip(costs, shares, strict=True):
        whole = sum(squares.values()) or 1.0
        for tensors, square in squares.items():
            saved = sum(_bytes_saved(source, tensor) for tensor in tensors)
            units.append(Unit(tensors, saved, float(cost) * square / whole))
    return tuple(units)


def _bytes_saved(source: WeightSource, tensor: str) -> int:
    rows, width = source.shape(tensor)
    form = _eight_bits(source, tensor)
    eight = form.blocks(width) * (form.block + 4)
    blocks = FOUR_BITS.blocks(width)
    return rows * (eight - blocks * (FOUR_BITS.block // 2 + 4) - -(-blocks // 2))
