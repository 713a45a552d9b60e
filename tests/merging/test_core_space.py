"""Small matrices against dense updates in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.merging import core_space

Double = npt.NDArray[np.float64]
LAYERS, N_IN, N_OUT, RANKS = 2, 18, 14, (3, 2, 4)
WEIGHTS = np.array([0.6, -0.3, 0.5])


def factors(seed: int = 0) -> list[tuple[Double, Double]]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((LAYERS, r, N_IN)), rng.standard_normal((LAYERS, r, N_OUT))) for r in RANKS]


def stacked(parts: list[tuple[Double, Double]]) -> tuple[Double, Double]:
    return np.concatenate([a for a, _ in parts], axis=1), np.concatenate([b for _, b in parts], axis=1)


def deltas(parts: list[tuple[Double, Double]]) -> Double:
    return np.stack([np.swapaxes(a, 1, 2) @ b for a, b in parts])


def grams(parts: list[tuple[Double, Double]]) -> tuple[Double, Double]:
    a, b = stacked(parts)
    return a @ np.swapaxes(a, 1, 2), b @ np.swapaxes(b, 1, 2)


def product(a: Double, b: Double) -> Double:
    return np.asarray(np.swapaxes(a, 1, 2) @ b)


def test_inner_products_are_those_of_the_updates() -> None:
    parts = factors()
    flat = deltas(parts).reshape(len(RANKS), -1)
    np.testing.assert_allclose(core_space.inner_products(*grams(parts), RANKS), flat @ flat.T, rtol=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_truncation_is_the_best_approximation(rank: int) -> None:
    parts = factors(1)
    a, b = stacked(parts)
    mixes = core_space.truncate(*grams(parts), rank, None)
    assert mixes.a is not None and mixes.b is not None
    u, s, vt = np.linalg.svd(product(a, b), full_matrices=False)
    expected = (u[:, :, :rank] * s[:, None, :rank]) @ vt[:, :rank]
    result = product(mixes.a @ a, mixes.b @ b)
    np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(mixes.energy, (s**2).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(mixes.kept_energy, (s[:, :rank] ** 2).sum(axis=1), rtol=1e-5)


@given(st.floats(0.05, 0.999))
def test_an_energy_target_takes_the_fewest_components(energy: float) -> None:
    parts = factors(2)
    mixes = core_space.truncate(*grams(parts), None, energy)
    s = np.linalg.svd(product(*stacked(parts)), compute_uv=False)[:, : sum(RANKS)]
    shares = np.cumsum(s**2, axis=1) / (s**2).sum(axis=1, keepdims=True)
    count = sum(RANKS) if mixes.a is None else mixes.a.shape[1]
    assert (shares[:, count - 1] >= energy - 1e-6).all()
    assert count == 1 or (shares[:, count - 2] < energy + 1e-6).any()


def test_a_rank_that_cuts_nothing_gives_the_rows_back() -> None:
    parts = factors(3)
    mixes = core_space.truncate(*grams(parts), sum(RANKS), None)
    assert mixes.a is None and mixes.b is None
    np.testing.assert_array_equal(mixes.kept_energy, mixes.energy)


def test_the_bases_are_orthonormal_and_lose_nothing() -> None:
    parts = factors(4)
    a, b = stacked(parts)
    space = core_space.core_space(*grams(parts), RANKS)
    for basis in (space.to_a @ a, space.to_b @ b):
        np.testing.assert_allclose(basis @ np.swapaxes(basis, 1, 2), np.broadcast_to(np.eye(9), (2, 9, 9)), atol=1e-4)
    for core, expected in zip(space.cores, deltas(parts), strict=True):
        np.testing.assert_allclose(product(a, space.between(core) @ b), expected, atol=1e-7 * np.abs(expected).max())


def test_the_cores_do_not_depend_on_how_an_update_was_factored() -> None:
    parts = factors(5)
    rng = np.random.default_rng(6)
    turned = []
    for a, b in parts:
        q = np.linalg.qr(rng.standard_normal((a.shape[1],) * 2))[0] * np.exp(rng.uniform(-1, 1, a.shape[1]))
        turned.append((np.linalg.inv(q).T @ a, q @ b))
    np.testing.assert_allclose(deltas(turned), deltas(parts), atol=1e-10)
    one, other = (core_space.core_space(*grams(p), RANKS).cores for p in (parts, turned))
    np.testing.assert_allclose(np.abs(other), np.abs(one), atol=1e-4 * np.abs(one).max())


def test_prune_keeps_the_largest() -> None:
    cores = np.random.default_rng(7).standard_normal((2, 3, 5, 5))
    pruned = core_space.prune(cores, 7)
    assert (np.count_nonzero(pruned, axis=(2, 3)) == 7).all()
    remaining = pruned != 0
    assert np.array_equal(pruned[remaining], cores[remaining])
    for matrix, mask in zip(cores.reshape(-1, 25), remaining.reshape(-1, 25), strict=True):
        assert np.abs(matrix[~mask]).max() < np.abs(matrix[mask]).min()


@given(st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3))
def test_the_disjoint_mean_of_one_is_that_one(weight: float) -> None:
    cores = np.random.default_rng(8).standard_normal((1, 2, 4, 4))
    np.testing.assert_allclose(core_space.disjoint_mean(cores, np.array([weight])), weight * cores[0], rtol=1e-12)


def test_the_disjoint_mean_of_those_that_agree_is_their_sum() -> None:
    cores = np.abs(np.random.default_rng(9).standard_normal((3, 2, 4, 4)))
    weights = np.array([0.5, 0.2, 0.3])
    expected = core_space.weighted_sum(cores, weights)
    np.testing.assert_allclose(core_space.disjoint_mean(cores, weights), expected, rtol=1e-12)


def test_the_disjoint_mean_leaves_out_what_disagrees() -> None:
    cores = np.array([2.0, 4.0, -1.0]).reshape(3, 1, 1, 1)
    weights = np.array([0.5, 0.25, 0.25])
    assert core_space.disjoint_mean(cores, weights).item() == pytest.approx((1.0 + 1.0) / 0.75)


@pytest.mark.parametrize("kind", ["twins", "zero adapter", "zero layer"])
def test_updates_that_span_less_than_their_ranks_are_merged_too(kind: str) -> None:
    parts = factors(10)
    if kind == "twins":
        parts[1] = (parts[0][0][:, :2], parts[0][1][:, :2])
    elif kind == "zero adapter":
        parts[1] = (parts[1][0], np.zeros_like(parts[1][1]))
    else:
        parts = [(a * np.array([0.0, 1.0])[:, None, None], b) for a, b in parts]
    a, b = stacked(parts)
    space = core_space.core_space(*grams(parts), RANKS)
    between = space.between(core_space.weighted_sum(space.cores, WEIGHTS))
    expected = np.einsum("k,klio->lio", WEIGHTS, deltas(parts))
    single = [x.astype(np.float32).astype(np.float64) for x in (a, between @ b)]  # what the graphs compute in
    np.testing.assert_allclose(product(*single), expected, atol=1e-4 * np.abs(expected).max())
    mixes = core_space.truncate(*grams(parts), 8, None)
    assert mixes.a is not None and np.isfinite(mixes.a).all()
    assert mixes.b is not None and np.isfinite(mixes.b).all()
