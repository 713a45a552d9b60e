"""Every scheme of the table: a name, the factors that it gives back, and its bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from benchmarks.bundle.coded import GAIN_BITS, Coded, Stored, constant, no_tags, split_by_energy, split_tags
from benchmarks.bundle.coders import fitted, rounded
from benchmarks.bundle.factors import Factors, Float, Pair, row_gain, svd_form
from edgecompose.bundle.quantization import Bits, QuantizedFactor, dequantize, quantize

_GROUP = 128
_RHOS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_BUDGETS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
#: Depths of A and of B that differ by at most one bit.
_NEAR = [(x, y) for x, y in itertools.product(range(1, 9), repeat=2) if abs(x - y) <= 1]


def schemes(factors: Factors) -> Iterable[Stored]:
    """Every scheme of the table."""
    svd = {name: svd_form(pair) for name, pair in factors.items()}
    yield from _format_schemes(factors, svd)
    for block in (32, 64, 128):
        plain, components = Coded(factors, block, fitted), Coded(svd, block, fitted)
        for form, coded, source in (("plain", plain, factors), ("SVD", components, svd)):
            for bits in (1, 2, 3, 4):
                yield coded.stored(f"{form} uniform {bits}, block {block}", constant(source, bits), no_tags)
        if block > 32:
            yield from _budget_schemes(plain, components, block)
    yield in_format("plain int4, unbiased", factors, 4, unbiased=True)
    yield from _unbiased_schemes(factors, svd)
    for label, coder in (("rtn", rounded), ("fit", fitted)):
        coded = Coded(svd, _GROUP, coder)
        for rho, high, low in itertools.product(_RHOS, (2, 3, 4), (0, 1, 2)):
            if low < 2 or high == 4:
                name = f"LoRAQuant {high}@{rho}, rest {low or 'dropped'}, {label}"
                yield coded.stored(name, split_by_energy(svd, rho, high=high, low=low), split_tags)


def _format_schemes(factors: Factors, svd: Factors) -> Iterable[Stored]:
    """Schemes of the bundle format."""
    rank = max(pair.a.shape[0] for pair in factors.values())
    depths: tuple[Bits, ...] = (8, 4)
    for bits in depths:
        yield in_format(f"plain int{bits}", factors, bits)
        yield in_format(f"SVD int{bits}", svd, bits)
        for cut in sorted({max(1, rank * part // 8) for part in (1, 2, 4, 6)}):
            first = {name: Pair(pair.a[:cut], pair.b[:cut]) for name, pair in svd.items()}
            yield in_format(f"SVD rank {cut}, int{bits}", first, bits)


def _budget_schemes(plain: Coded, components: Coded, block: int) -> Iterable[Stored]:
    """Bits for each component; plain components are not orthogonal, and are never dropped."""
    for budget in _BUDGETS:
        yield components.within(f"SVD budget {budget}, block {block}", budget, [(0, 0), *_NEAR])
        if budget >= 1.5:
            yield plain.within(f"plain budget {budget}, block {block}", budget, _NEAR)
    for depths, budget in itertools.product(((0, 4), (0, 2, 4), (0, 2, 4, 8)), _BUDGETS):
        name = f"SVD budget {budget} of {'/'.join(map(str, depths))} bits, block {block}"
        yield components.within(name, budget, [(x, x) for x in depths])
    for label, depths in (("any", tuple(range(9))), ("0/2/4/8", (0, 2, 4, 8))):
        for budget in _BUDGETS:
            name = f"SVD ladder {budget} of {label} bits, block {block}"
            yield components.within(name, budget, [(x, x) for x in depths], ladder=True)


def _unbiased_schemes(factors: Factors, svd: Factors) -> Iterable[Stored]:
    """Some of the other schemes, with each row stretched to its own length along itself."""
    for block in (64, 128):
        plain = Coded(factors, block, fitted, unbiased=True)
        for bits in (2, 3, 4):
            yield plain.stored(f"plain uniform {bits}, block {block}, unbiased", constant(factors, bits), no_tags)
    components = Coded(svd, 128, fitted, unbiased=True)
    for budget in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5):
        yield components.within(f"SVD budget {budget}, block 128, unbiased", budget, [(0, 0), *_NEAR])
    grouped = Coded(svd, _GROUP, fitted, unbiased=True)
    for high in (2, 3):
        name = f"LoRAQuant {high}@0.9, rest 1, fit, unbiased"
        yield grouped.stored(name, split_by_energy(svd, 0.9, high=high, low=1), split_tags)


def in_format(scheme: str, factors: Factors, bits: Bits, *, unbiased: bool = False) -> Stored:
    """Factors in the bundle format."""
    total, result = 0, {}
    for name, pair in factors.items():
        sides = [(side, quantize(side, bits)) for side in (pair.a, pair.b)]
        if unbiased:
            sides = [(side, _stretched(side, q)) for side, q in sides]
        total += sum(8 * (q.codes.nbytes + q.scales.nbytes) + GAIN_BITS for _, q in sides)
        result[name] = Pair(*(dequantize(q) for _, q in sides))
    return Stored(scheme, result, total)


def _stretched(rows: Float, quantized: QuantizedFactor) -> QuantizedFactor:
    """The same codes under scales that preserve each row's length along itself."""
    gain = row_gain(rows, dequantize(quantized))
    return replace(quantized, scales=(quantized.scales * gain[..., None]).astype(np.float16))
