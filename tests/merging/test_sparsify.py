"""Which entries prunes and drops keep."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.bundle.adapter import DENSITIES
from edgecompose.bundle.quantization import BITS, Bits, QuantizedFactor, dequantize, pack, quantize
from edgecompose.errors import MergeError
from edgecompose.merging.sparsify import keep_largest, keep_random, kept_entries, random_mask, thresholds
from tests.factories import make_factor


@pytest.mark.parametrize("bits", BITS)
@given(density=st.floats(0.02, 1))
def test_the_largest_magnitudes_stay_and_no_more(bits: Bits, density: float) -> None:
    factor = quantize(np.random.default_rng(1).standard_normal((3, 4, 32)).astype(np.float32), bits)
    before, after = dequantize(factor), dequantize(keep_largest(factor, density))
    for old, new in zip(before.reshape(3, -1), after.reshape(3, -1), strict=True):
        remaining = new != 0
        assert remaining.sum() <= kept_entries(density, 128)
        assert np.array_equal(new[remaining], old[remaining])
        if remaining.any() and not remaining.all():
            assert np.abs(old[~remaining]).max() <= np.abs(old[remaining]).min()
        assert np.count_nonzero(new) == min(kept_entries(density, 128), np.count_nonzero(old))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("density", DENSITIES)
def test_known_thresholds_give_the_same(bits: Bits, density: float) -> None:
    factor = make_factor(np.random.default_rng(2), 4, 3, 64, bits)
    known = thresholds(factor)
    assert known.shape == (len(DENSITIES), 3)
    assert np.array_equal(keep_largest(factor, density, known).codes, keep_largest(factor, density).codes)


def test_of_equal_magnitudes_the_first_stay() -> None:
    factor = quantize(np.ones((1, 2, 8), np.float32), 8)
    assert dequantize(keep_largest(factor, 0.5)).ravel().tolist() == [1.0] * 8 + [0.0] * 8


def test_density_1_keeps_the_factor() -> None:
    factor = make_factor(np.random.default_rng(3), 2, 2, 32, 4)
    assert keep_largest(factor, 1.0) is factor


def test_a_density_that_keeps_nothing_names_one_that_would_do() -> None:
    factor = make_factor(np.random.default_rng(4), 1, 1, 32, 8)
    with pytest.raises(MergeError, match=r"raise it to at least 0\.03125"):
        keep_largest(factor, 0.01)
    assert np.count_nonzero(dequantize(keep_largest(factor, 0.03125))) == 1


@pytest.mark.parametrize("bits", BITS)
def test_drops_follow_their_seed_and_density(bits: Bits) -> None:
    factor = quantize(np.random.default_rng(5).standard_normal((4, 16, 256)).astype(np.float32) + 3, bits)
    one, other = keep_random(factor, 0.3, "seed"), keep_random(factor, 0.3, "another")
    assert np.array_equal(one.codes, keep_random(factor, 0.3, "seed").codes)
    assert not np.array_equal(one.codes, other.codes)
    before, after = dequantize(factor), dequantize(one)
    remaining = after != 0
    assert np.array_equal(after[remaining], before[remaining])
    assert remaining.sum() / np.count_nonzero(before) == pytest.approx(0.3, abs=0.02)


def test_masks_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(np.packbits(random_mask((64, 64), 0.5, "edgecompose")).tobytes()).hexdigest()
    assert digest[:16] == "76195462bb2969eb"


@pytest.mark.parametrize("bits", BITS)
@given(seed=st.integers(0, 10_000), density=st.floats(0.02, 0.99), shrink=st.floats(1e-3, 1))
def test_codes_are_kept_as_their_values_would_be(bits: Bits, seed: int, density: float, shrink: float) -> None:
    """Blocks of very different scales, zeros and many equal magnitudes among them."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-4, 5, (2, 3, 32)) * np.where(rng.random((2, 3, 1)) < 0.5, shrink, 1)
    factor = quantize(values.astype(np.float32), bits)
    magnitudes = np.abs(dequantize(factor)).reshape(2, -1)
    remaining = kept_entries(density, magnitudes.shape[1])
    order = np.argsort(-magnitudes, axis=-1, kind="stable")[:, :remaining]
    expected = np.zeros_like(magnitudes, bool)
    np.put_along_axis(expected, order, True, axis=-1)
    result = dequantize(keep_largest(factor, density)).reshape(2, -1)
    np.testing.assert_array_equal(result != 0, expected & (magnitudes > 0))


def test_a_block_of_scale_zero_is_pruned() -> None:
    codes = pack(np.full((1, 1, 64), 15, np.uint8), 4)
    factor = QuantizedFactor(codes, np.array([[[0.0, 1.0]]], np.float16), 1.0, 4)
    assert np.count_nonzero(dequantize(keep_largest(factor, 0.25))) == 16
