"""Rows on the host and rows on the device: the same values, and what is kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from edgecompose.bundle.adapter import Adapter
from edgecompose.bundle.quantization import Bits, QuantizedFactor, dequantize, quantize, unpack
from edgecompose.bundle.specs import SlotGroup
from edgecompose.engine.device import choose_device
from edgecompose.merging.gather import ResidentRows, resident_codes
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import METHODS
from edgecompose.merging.runner import GraphRunner
from edgecompose.merging.sparsify import RANDOM
from edgecompose.settings import MergeSettings
from tests.factories import WIDE, make_adapter

#: Two widths of whole blocks of 32, as the graphs of resident rows need them.
BLOCKED = (SlotGroup("q_proj", 3, 64, 96), SlotGroup("up_proj", 2, 96, 64))
WEIGHTS = (0.6, -0.3, 0.2)
BITS: dict[str, tuple[Bits, ...]] = {"int4": (4, 4, 4), "int8": (8, 8, 8), "mixed": (4, 8, 4)}


@pytest.fixture(scope="module")
def resident() -> Merger:
    """A merger that keeps rows on its device, which is the CPU here: the graphs are those of CUDA."""
    return Merger(choose_device("cpu"), resident=True)


def _adapters(bits: tuple[Bits, ...], groups: tuple[SlotGroup, ...] = BLOCKED) -> list[Adapter]:
    return [make_adapter(f"row{i}-{b}", groups=groups, bits=b, rank=4) for i, b in enumerate(bits)]


def _assert_same(one: Merger, other: Merger, adapters: list[Adapter], settings: MergeSettings) -> None:
    weights = WEIGHTS[: len(adapters)]
    expected, result = (m.merge(adapters, weights, settings).factors() for m in (one, other))
    assert sorted(result) == sorted(expected)
    for name, factors in expected.items():
        for a, b in zip(factors, result[name], strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * np.abs(a).max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", METHODS)
def test_resident_rows_give_what_rows_of_the_host_give(
    merger: Merger, resident: Merger, method: str, bits: str
) -> None:
    _assert_same(merger, resident, _adapters(BITS[bits]), MergeSettings(method, 0.5))


def test_both_majority_signs_from_resident_rows(merger: Merger, resident: Merger) -> None:
    _assert_same(merger, resident, _adapters((4, 4, 4)), MergeSettings("ties", 0.5, "frequency"))


def test_blocks_that_resident_rows_cannot_take_come_from_the_host(merger: Merger, resident: Merger) -> None:
    _assert_same(merger, resident, _adapters((8, 4), WIDE), MergeSettings())


def test_mixed_ranks_from_resident_rows(merger: Merger, resident: Merger) -> None:
    adapters = [make_adapter(f"rank{r}", groups=BLOCKED, rank=r, bits=4) for r in (2, 8, 5)]
    _assert_same(merger, resident, adapters, MergeSettings())


def test_rows_are_sent_up_once_and_the_pool_grows() -> None:
    merger = Merger(choose_device("cpu"), resident=True)
    rows = merger._resident
    assert rows is not None and rows.bytes == 0
    merger.merge(_adapters((4,)), [1.0], MergeSettings())
    size = rows.bytes
    many = [make_adapter(f"many{i}", groups=BLOCKED, rank=64, bits=4) for i in range(12)]
    for start in (0, 4, 8, 0):
        merger.merge(many[start : start + 4], [0.25] * 4, MergeSettings())
    grown = rows.bytes
    assert grown > size
    plain = Merger(choose_device("cpu"))
    _assert_same(plain, merger, many[:3], MergeSettings())
    _assert_same(plain, merger, _adapters((4, 4)), MergeSettings())
    assert rows.bytes == grown


def test_beyond_the_limit_rows_are_forgotten_and_sent_up_again() -> None:
    merger, plain = Merger(choose_device("cpu"), resident=True), Merger(choose_device("cpu"))
    merger._resident = ResidentRows(choose_device("cpu"), GraphRunner(choose_device("cpu")).copy, limit_bytes=160_000)
    adapters = [make_adapter(f"limit{i}", groups=BLOCKED, rank=32, bits=4) for i in range(9)]
    for start in (0, 3, 6, 0):
        _assert_same(plain, merger, adapters[start : start + 3], MergeSettings())


def test_threads_that_make_the_pool_grow_disturb_nobody() -> None:
    merger, plain = Merger(choose_device("cpu"), resident=True), Merger(choose_device("cpu"))
    adapters = [make_adapter(f"thread{i}", groups=BLOCKED, rank=12, bits=4) for i in range(16)]
    pairs = [(adapters[i], adapters[(5 * i + 1) % 16]) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(lambda pair: merger.merge(pair, [0.7, 0.3], MergeSettings()).factors(), pairs))
    for pair, factors in zip(pairs, result, strict=True):
        for name, expected in plain.merge(pair, [0.7, 0.3], MergeSettings()).factors().items():
            for a, b in zip(expected, factors[name], strict=True):
                np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * np.abs(a).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_4_bits_are_the_same_values_in_either_form(bits: Bits) -> None:
    factor = _adapters((4,))[0].modules["q_proj"].a
    codes = resident_codes(factor, bits)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    zero_point = 8 if bits == 4 else 128
    expected = unpack(factor).reshape(codes.shape).astype(int) - factor.zero_point
    assert np.array_equal(codes.astype(int) - zero_point, expected)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_in_float16_blend_as_their_values_do(merger: Merger, method: str) -> None:
    """Against the integers that they were made of; a rounding turns a few votes and ranks at a threshold."""
    jumps = 0.02 if METHODS[method].sparsify else 0.0
    adapters = _adapters((8, 8, 8))
    halves = [
        replace(a, bits=16, modules={n: replace(m, a=_half(m.a), b=_half(m.b)) for n, m in a.modules.items()})
        for a in adapters
    ]
    if METHODS[method].sparsify is RANDOM:
        halves = [replace(half, digest=a.digest) for half, a in zip(halves, adapters, strict=True)]
    expected, result = (
        Merger(choose_device("cpu")).merge(a, WEIGHTS, MergeSettings(method)) for a in (adapters, halves)
    )
    for name, factors in expected.factors().items():
        for a, b in zip(factors, result.factors()[name], strict=True):
            assert (np.abs(b - a) > 2e-3 * np.abs(a).max()).mean() <= jumps


def _half(factor: QuantizedFactor) -> QuantizedFactor:
    return quantize(dequantize(factor), 16)


def test_float16_blends_with_integers(merger: Merger) -> None:
    adapters = _adapters((4, 8, 16))
    result = merger.merge(adapters, WEIGHTS, MergeSettings()).factors()
    for name, (a, b) in result.items():
        modules = [adapter.modules[name] for adapter in adapters]
        wanted_a = np.concatenate(
            [w * m.scaling[:, None, None] * dequantize(m.a) for m, w in zip(modules, WEIGHTS, strict=True)], axis=1
        )
        np.testing.assert_allclose(a, wanted_a, rtol=0, atol=1e-3 * np.abs(wanted_a).max())
        wanted_b = np.concatenate([dequantize(m.b) for m in modules], axis=1)
        np.testing.assert_allclose(b, wanted_b, rtol=0, atol=1e-3 * np.abs(wanted_b).max())
