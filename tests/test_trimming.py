"""Which entries prunes and drops keep."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.errors import MergeError
from edgecompose.quantization import Bits, dequantize, quantize
from edgecompose.trimming import DENSITIES, drop, kept_entries, prune, random_mask, thresholds
from tests.factories import make_factor

BITS: tuple[Bits, ...] = (4, 8)


@pytest.mark.parametrize("bits", BITS)
@given(density=st.floats(0.02, 1))
def test_the_largest_magnitudes_stay_and_no_more(bits: Bits, density: float) -> None:
    factor = quantize(np.random.default_rng(1).standard_normal((3, 4, 32)).astype(np.float32), bits)
    before, after = dequantize(factor), dequantize(prune(factor, density))
    for old, new in zip(before.reshape(3, -1), after.reshape(3, -1), strict=True):
        kept = new != 0
        assert kept.sum() <= kept_entries(density, 128)
        assert np.array_equal(new[kept], old[kept])
        if kept.any() and not kept.all():
            assert np.abs(old[~kept]).max() <= np.abs(old[kept]).min()
        assert np.count_nonzero(new) == min(kept_entries(density, 128), np.count_nonzero(old))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("density", DENSITIES)
def test_known_thresholds_give_the_same(bits: Bits, density: float) -> None:
    factor = make_factor(np.random.default_rng(2), 4, 3, 64, bits)
    known = thresholds(factor)
    assert known.shape == (len(DENSITIES), 3)
    assert np.array_equal(prune(factor, density, known).codes, prune(factor, density).codes)


def test_of_equal_magnitudes_the_first_stay() -> None:
    factor = quantize(np.ones((1, 2, 8), np.float32), 8)
    assert dequantize(prune(factor, 0.5)).ravel().tolist() == [1.0] * 8 + [0.0] * 8


def test_density_1_keeps_the_factor() -> None:
    factor = make_factor(np.random.default_rng(3), 2, 2, 32, 4)
    assert prune(factor, 1.0) is factor


def test_a_density_that_keeps_nothing_names_one_that_would_do() -> None:
    factor = make_factor(np.random.default_rng(4), 1, 1, 32, 8)
    with pytest.raises(MergeError, match=r"raise it to at least 0\.03125"):
        prune(factor, 0.01)
    assert np.count_nonzero(dequantize(prune(factor, 0.03125))) == 1


@pytest.mark.parametrize("bits", BITS)
def test_drops_follow_their_seed_and_density(bits: Bits) -> None:
    factor = quantize(np.random.default_rng(5).standard_normal((4, 16, 256)).astype(np.float32) + 3, bits)
    one, other = drop(factor, 0.3, "seed"), drop(factor, 0.3, "another")
    assert np.array_equal(one.codes, drop(factor, 0.3, "seed").codes)
    assert not np.array_equal(one.codes, other.codes)
    before, after = dequantize(factor), dequantize(one)
    kept = after != 0
    assert np.array_equal(after[kept], before[kept])
    assert kept.sum() / np.count_nonzero(before) == pytest.approx(0.3, abs=0.02)


def test_masks_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(np.packbits(random_mask((64, 64), 0.5, "edgecompose")).tobytes()).hexdigest()
    assert digest[:16] == "76195462bb2969eb"
