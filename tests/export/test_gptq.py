"""Error feedback lowers what rounding does to outputs, and never leaves the grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnx", reason="a package of edgecompose-export")

from edgecompose_export.weights.blocks import Blocks
from edgecompose_export.weights.gptq import Compensation

Float = npt.NDArray[np.float32]


def rounded(rows: Float) -> Float:
    """Each block of 32 to the nearest of 16 levels between its ends."""
    blocks = rows.reshape(len(rows), -1, 32)
    low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    step = (high - low) / 15
    zero = np.rint(-low / step)
    return np.asarray(((np.clip(np.rint(blocks / step) + zero, 0, 15) - zero) * step).reshape(rows.shape), np.float32)


def correlated(seed: int, count: int, width: int) -> Float:
    rng = np.random.default_rng(seed)
    return np.asarray(
        rng.normal(size=(count, 8)) @ rng.normal(size=(8, width)) + rng.normal(size=(count, width)) * 0.3, np.float32
    )


def error(inputs: Float, rows: Float, quantised: Float) -> float:
    return float(np.square(inputs @ (rows - quantised).T).mean())


@pytest.mark.parametrize("seed", range(5))
def test_outputs_are_nearer_than_those_of_plain_rounding(seed: int) -> None:
    width = 128
    rows = np.random.default_rng(seed).normal(size=(48, width)).astype(np.float32)
    inputs, unseen = correlated(seed, 1024, width)[:768], correlated(seed, 1024, width)[768:]
    blocks = Compensation(inputs.T @ inputs).quantize(rows.copy())
    quantised = blocks.values(width)
    assert error(inputs, rows, quantised) < 0.5 * error(inputs, rows, rounded(rows))
    assert error(unseen, rows, quantised) < 0.6 * error(unseen, rows, rounded(rows))


def test_independent_inputs_leave_little_to_gain_and_nothing_to_lose() -> None:
    rows = np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32)
    quantised = Compensation(np.eye(64, dtype=np.float32)).quantize(rows.copy()).values(64)
    ours, plain = (float(np.square(rows - values).mean()) for values in (quantised, rounded(rows)))
    assert 0.5 * plain < ours <= plain


def check_grid(blocks: Blocks) -> None:
    assert blocks.zeros is not None and blocks.offsets is None
    assert blocks.codes.max() <= 15 and blocks.zeros.max() <= 15
    assert np.isfinite(blocks.scales).all() and (blocks.scales > 0).all()


@pytest.mark.parametrize("dead", [0, 31, 32, 63])
def test_an_input_that_is_always_zero_breaks_nothing(dead: int) -> None:
    inputs = correlated(2, 100, 64)
    inputs[:, dead] = 0
    rows = np.random.default_rng(3).normal(size=(16, 64)).astype(np.float32)
    blocks = Compensation(inputs.T @ inputs).quantize(rows.copy())
    check_grid(blocks)
    assert error(inputs, rows, blocks.values(64)) < error(inputs, rows, rounded(rows))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-15, 1e15])
def test_constant_rows_stay_themselves(value: float) -> None:
    rows = np.full((4, 64), value, np.float32)
    blocks = Compensation(np.zeros((64, 64), np.float32)).quantize(rows.copy())
    check_grid(blocks)
    assert np.allclose(blocks.values(64), value, rtol=0.04)


def test_fewer_inputs_than_weights_are_enough() -> None:
    inputs = correlated(4, 10, 96)
    rows = np.random.default_rng(5).normal(size=(16, 96)).astype(np.float32)
    blocks = Compensation(inputs.T @ inputs).quantize(rows.copy())
    check_grid(blocks)
    assert error(inputs, rows, blocks.values(96)) < 0.5 * error(inputs, rows, rounded(rows))


@pytest.mark.parametrize("factor", [1e2, 1e3, 1e4, 1e6])
def test_one_input_may_be_far_larger_than_the_others(factor: float) -> None:
    inputs = correlated(6, 1000, 128)
    inputs[:, 5] *= np.float32(factor)
    rows = np.random.default_rng(7).normal(size=(48, 128)).astype(np.float32)
    blocks = Compensation(inputs.T @ inputs).quantize(rows.copy())
    check_grid(blocks)
    values = blocks.values(128)
    assert error(inputs, rows, values) < 0.5 * error(inputs, rows, rounded(rows))
    assert np.abs(values - rows).max() < 0.5 * np.abs(rows).max()
