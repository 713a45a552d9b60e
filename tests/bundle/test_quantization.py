"""Block quantisation of adapter factors: bounds, limits and layout."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgecompose.bundle.quantization import (
    BITS,
    Bits,
    QuantizedFactor,
    block_for,
    dequantize,
    pack,
    quantize,
    relative_error,
    unpack,
    unpack_into,
)
from edgecompose.errors import AdapterError

Float = npt.NDArray[np.float32]
INTEGERS: tuple[Bits, ...] = (4, 8)
_WIDTHS = st.sampled_from([2, 6, 8, 24, 32, 48, 64])
_SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 2), _WIDTHS)
_VALUES = st.floats(-1, 1, width=16)
FACTORS = _SHAPES.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=_VALUES))
MAGNITUDES = st.sampled_from([1e-6, 1e-3, 1.0, 1e6])


def _blocks(values: Float) -> npt.NDArray[np.float64]:
    return values.astype(np.float64).reshape(*values.shape[:2], -1, block_for(values.shape[2], 8))


def _normal(seed: int, shape: tuple[int, int, int]) -> Float:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(FACTORS, MAGNITUDES)
def test_8_bits_err_by_at_most_half_a_step_of_the_block(values: Float, magnitude: float) -> None:
    factor = values * np.float32(magnitude)
    quantized = quantize(factor, 8)
    error = np.abs(_blocks(factor) - _blocks(dequantize(quantized)))
    step = np.abs(_blocks(factor)).max(-1, keepdims=True) / 127
    rounding_of_the_scale = 127 * quantized.gain * 2.0**-25  # float16 is that coarse near zero
    assert (error <= step / 2 * 1.001 + rounding_of_the_scale).all()


@given(FACTORS, MAGNITUDES)
def test_4_bits_err_by_less_than_a_step_in_the_mean_of_a_block(values: Float, magnitude: float) -> None:
    factor = values * np.float32(magnitude)
    quantized = quantize(factor, 4)
    error = _blocks(factor) - _blocks(dequantize(quantized))
    step = np.abs(_blocks(factor)).max(-1) / 8
    assert (np.sqrt(np.square(error).mean(-1)) <= step * 1.01 + 8 * quantized.gain * 2.0**-25).all()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.008), (4, 0.11)])
def test_normal_values_lose_little(bits: Bits, bound: float) -> None:
    factor = _normal(0, (8, 4, 256))
    assert 0 < relative_error(factor, quantize(factor, bits)) < bound


def test_4_bits_trade_clipped_peaks_for_finer_steps() -> None:
    factor = _normal(6, (8, 4, 256))
    blocks = _blocks(factor)
    peaks = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    naive = np.clip(np.rint(blocks / (peaks / -8)), -8, 7) * (peaks / -8)
    error = np.square(blocks - naive).sum(-1)
    result = np.square(blocks - _blocks(dequantize(quantize(factor, 4)))).sum(-1)
    assert (result <= error * 1.01).all()
    assert result.sum() < 0.95 * error.sum()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("exponent", [-90, -20, 20, 90])
def test_the_codes_do_not_depend_on_the_magnitude(bits: Bits, exponent: int) -> None:
    factor = _normal(1, (2, 2, 64))
    plain, scaled = quantize(factor, bits), quantize(factor * np.float32(2.0**exponent), bits)
    assert np.array_equal(plain.codes, scaled.codes)
    assert np.array_equal(plain.scales, scaled.scales)
    assert scaled.gain == pytest.approx(plain.gain * 2.0**exponent)


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_factor_stays_zero(bits: Bits) -> None:
    factor = np.zeros((2, 3, 32), np.float32)
    quantized = quantize(factor, bits)
    assert not dequantize(quantized).any()
    assert relative_error(factor, quantized) == 0


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_block_beside_others_stays_zero(bits: Bits) -> None:
    factor = _normal(2, (1, 1, 64))
    factor[..., 32:] = 0
    restored = dequantize(quantize(factor, bits))
    assert not restored[..., 32:].any()
    assert restored[..., :32].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bits: Bits, bad: float) -> None:
    factor = np.ones((1, 2, 8), np.float32)
    factor[0, 1, 3] = bad
    with pytest.raises(AdapterError, match="not finite"):
        quantize(factor, bits)


def test_an_odd_width_takes_8_bits_only() -> None:
    factor = _normal(3, (2, 2, 7))
    with pytest.raises(AdapterError, match="odd width 7"):
        quantize(factor, 4)
    assert np.allclose(dequantize(quantize(factor, 8)), factor, rtol=1e-3)


@pytest.mark.parametrize("bits", INTEGERS)
@pytest.mark.parametrize("width", [6, 48, 64])
def test_unpacked_codes_times_scales_are_the_values(bits: Bits, width: int) -> None:
    quantized = quantize(_normal(4, (3, 2, width)), bits)
    raised = unpack(quantized)
    assert raised.dtype == np.uint8
    codes = raised.astype(np.int16) - quantized.zero_point
    assert codes.shape == (3, 2, width)
    assert codes.min() >= (-127 if bits == 8 else -8)
    assert codes.max() <= (127 if bits == 8 else 7)
    scales = np.repeat(quantized.scales.astype(np.float32), quantized.block, axis=-1) * np.float32(quantized.gain)
    assert np.array_equal(dequantize(quantized), codes * scales)


def test_float16_errs_by_a_rounding_of_the_row_s_largest_value() -> None:
    factor = _normal(6, (3, 2, 48)) * np.float32(1e-9)
    quantized = quantize(factor, 16)
    assert quantized.codes.dtype == np.float16
    assert quantized.codes.shape == (3, 2, 48)
    assert (quantized.scales.shape, quantized.block) == ((3, 2, 1), 48)
    assert np.abs(quantized.codes).max() <= 1.001
    rows = np.abs(factor).max(axis=-1, keepdims=True)
    assert (np.abs(dequantize(quantized) - factor) <= 2.0**-10 * rows).all()


def test_the_nibbles_of_a_layer_are_half_a_layer_apart() -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(2, 2, 4)
    packed = pack(codes, 4)
    assert packed.shape == (2, 2, 2)
    assert packed.ravel().tolist() == [0x40, 0x51, 0x62, 0x73, 0xC8, 0xD9, 0xEA, 0xFB]
    factor = QuantizedFactor(packed, np.ones((2, 2, 1), np.float16), 1.0, 4)
    assert np.array_equal(unpack(factor), codes)
    flat = np.zeros((1, 8), np.uint8)
    unpack_into(flat, factor, slice(1, 2))
    assert np.array_equal(flat.reshape(1, 2, 4), codes[1:])


def test_byte_j_of_a_4_bit_row_holds_elements_j_and_j_plus_half() -> None:
    packed = np.array([[[0x80, 0xF1, 0x23, 0x45]]], np.uint8)  # one row of 8
    factor = QuantizedFactor(packed, np.ones((1, 1, 1), np.float16), 1.0, 4)
    assert unpack(factor).ravel().tolist() == [0, 1, 3, 5, 8, 15, 2, 4]
    assert dequantize(factor).ravel().tolist() == [-8, -7, -5, -3, 0, 7, -6, -4]


@pytest.mark.parametrize("bits", INTEGERS)
def test_shapes_follow_the_format(bits: Bits) -> None:
    quantized = quantize(_normal(5, (3, 2, 48)), bits)
    assert quantized.codes.shape == (3, 2, 48 if bits == 8 else 24)
    assert quantized.codes.dtype == np.uint8
    assert quantized.scales.shape == (3, 2, 3)
    assert quantized.scales.dtype == np.float16
    assert (quantized.width, quantized.block) == (48, 16)


@pytest.mark.parametrize(("width", "block"), [(1, 1), (2, 2), (6, 2), (7, 1), (24, 8), (32, 32), (48, 16), (96, 32)])
def test_block_is_the_largest_power_of_two_that_divides(width: int, block: int) -> None:
    assert block_for(width, 4) == block_for(width, 8) == block
    assert block_for(width, 16) == width
