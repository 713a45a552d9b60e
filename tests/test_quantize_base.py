"""Weight quantisation of the base: lossless on what a GGUF holds, bounded on anything else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

pytest.importorskip("onnx", reason="quantising a base wants the packages of the extra [export]")
from edgecompose_export.quantize import BLOCK, extend_rows_4bit, quantize_rows_4bit, quantize_rows_8bit

Float = npt.NDArray[np.float32]
ROWS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 3), st.sampled_from([32, 64])), elements=st.floats(-4, 4, width=16)
)


def _blocks(rows: Float) -> Float:
    return rows.reshape(rows.shape[0], -1, BLOCK)


def _unpack(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], BLOCK)


def _from_8bit(rows: Float) -> Float:
    codes, scales = quantize_rows_8bit(rows)
    return (codes.astype(np.float32) - 128) * scales[..., None]


def _from_4bit(rows: Float) -> Float:
    """As the graph computes it: d (q - 8) + correction."""
    packed, scales, correction = quantize_rows_4bit(rows)
    return (_unpack(packed).astype(np.float32) - 8) * scales[..., None] + correction[..., None]


def _integers(rng: np.random.Generator, low: int, high: int) -> npt.NDArray[np.int64]:
    """Codes (16, 4, 32) of which every block has both ends."""
    codes = rng.integers(low, high + 1, (16, 4, BLOCK))
    codes[..., 3], codes[..., 17] = low, high
    return codes


def test_8_bits_are_lossless_on_q8_0() -> None:
    rng = np.random.default_rng(0)
    codes = _integers(rng, -127, 127)
    scales = rng.uniform(1e-4, 0.02, (16, 4)).astype(np.float16).astype(np.float32)
    found, found_scales = quantize_rows_8bit((codes * scales[..., None]).astype(np.float32).reshape(16, -1))
    assert np.array_equal(found.astype(int) - 128, codes)
    assert np.array_equal(found_scales, scales)


def test_4_bits_are_lossless_on_q4_1() -> None:
    rng = np.random.default_rng(1)
    codes = _integers(rng, 0, 15)
    scales = rng.uniform(1e-3, 0.05, (16, 4)).astype(np.float16).astype(np.float32)
    lows = rng.uniform(-0.4, 0.1, (16, 4)).astype(np.float16).astype(np.float32)
    rows = (codes * scales[..., None] + lows[..., None]).astype(np.float32).reshape(16, -1)
    packed, found_scales, correction = quantize_rows_4bit(rows)
    assert np.array_equal(_unpack(packed), codes)
    np.testing.assert_allclose(found_scales, scales, rtol=1e-5)
    np.testing.assert_allclose(correction, lows + 8 * scales, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(_from_4bit(rows), _blocks(rows), rtol=0, atol=1e-6)


@given(ROWS)
def test_8_bits_err_by_at_most_half_a_step(rows: Float) -> None:
    step = np.abs(_blocks(rows)).max(-1, keepdims=True) / 127
    assert (np.abs(_from_8bit(rows) - _blocks(rows)) <= step * 0.5001).all()


@given(ROWS)
def test_4_bits_err_by_at_most_half_a_step(rows: Float) -> None:
    blocks = _blocks(rows)
    step = (blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)) / 15
    assert (np.abs(_from_4bit(rows) - blocks) <= step * 0.5001 + 1e-6 * np.abs(blocks).max()).all()


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_constant_block_is_exact(value: float) -> None:
    rows = np.full((2, 64), value, np.float32)
    assert np.array_equal(_from_8bit(rows), _blocks(rows))
    assert np.array_equal(_from_4bit(rows), _blocks(rows))


def test_shapes_are_those_of_the_kernel() -> None:
    rows = np.random.default_rng(2).normal(size=(5, 96)).astype(np.float32)
    codes, scales = quantize_rows_8bit(rows)
    assert codes.shape == (5, 3, 32)
    packed, more_scales, correction = quantize_rows_4bit(rows)
    assert packed.shape == (5, 3, 16)
    assert codes.dtype == packed.dtype == np.uint8
    for values in (scales, more_scales, correction):
        assert values.shape == (5, 3)
        assert values.dtype == np.float32


@pytest.mark.parametrize("count", [1, 2, 3, 18, 31, 32, 33, 48, 64, 100, 128])
def test_the_correction_is_kept_in_blocks_behind_the_weights(count: int) -> None:
    rng = np.random.default_rng(count)
    correction = rng.normal(size=(7, count)).astype(np.float32)
    packed, scales, copies = extend_rows_4bit(correction)
    assert packed.shape == (7, -(-copies * count // BLOCK), 16) and scales.shape == packed.shape[:2]
    weights = ((_unpack(packed).astype(np.float32) - 8) * scales[..., None]).reshape(7, -1)
    sums = rng.normal(size=(5, count)).astype(np.float32)
    extended = np.tile(sums, copies)
    assert not weights[:, extended.shape[1] :].any()  # there is nothing there to multiply with
    kept = weights[:, : extended.shape[1]].reshape(7, copies, count).sum(1)
    assert np.abs(kept - correction).max() <= np.abs(correction).max() / 128
    np.testing.assert_allclose(extended @ weights[:, : extended.shape[1]].T, sums @ kept.T, atol=1e-4)


def test_no_correction_adds_nothing() -> None:
    packed, scales, _ = extend_rows_4bit(np.zeros((2, 18), np.float32))
    assert not scales.any() and (_unpack(packed) == 8).all()
