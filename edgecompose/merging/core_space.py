"""Merging in the space that the adapters span together: small matrices in place of updates; numpy only.

For the stacked factors A (R, n_in) and B (R, n_out) of one layer, R being the sum of ranks, every update lies in the
span of A's rows times the span of B's rows. What a method needs of them are the Gram matrices A A^T and B B^T (R, R);
what it gives back are small matrices that mix the rows. Nothing is lost but what a method drops on purpose, and no
n_in x n_out matrix is ever formed (Core Space, arXiv 2509.17786).

The bases are the singular vectors of [ΔW_1 ... ΔW_K] and of [ΔW_1^T ... ΔW_K^T] (KnOTS, arXiv 2410.19735): they
depend on the updates alone, not on how each was factored. All arrays have the layers L first, and are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Double = npt.NDArray[np.float64]
#: Added to a Gram matrix, relative to its largest diagonal entry: above the noise that float32 products leave in it.
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Recombination:
    """Merged factors as mixtures of the stacked rows: A' = a A, B' = b B; `a`, `b` (L, P, R), or None for the rows as
    they are.

    `energy` and `kept_energy` (L,) are the squared Frobenius norms of the sum before and after truncation.
    """

    a: Double | None
    b: Double | None
    energy: Double
    kept_energy: Double


@dataclass(frozen=True, slots=True, eq=False)
class CoreSpace:
    """Shared orthonormal bases and each adapter's update in them.

    `to_a`, `to_b` (L, R, R) turn the stacked rows into the bases; `cores` (K, L, R, R) are the updates:
    ΔW_i = (to_a A)^T cores[i] (to_b B).
    """

    to_a: Double
    to_b: Double
    cores: Double

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        return self.to_a.nbytes + self.to_b.nbytes + self.cores.nbytes

    def between(self, core: Double) -> Double:
        """The matrix M (L, R, R) between the stacked rows, A^T M B, that is the update `core` (L, R, R)."""
        return np.asarray(np.swapaxes(self.to_a, 1, 2) @ core @ self.to_b, np.float64)


def inner_products(gram_a: Double, gram_b: Double, ranks: tuple[int, ...]) -> Double:
    """<ΔW_i, ΔW_j> of every pair, summed over layers: (K, K). <ΔW_i, ΔW_j> = sum of (A_i A_j^T) * (B_i B_j^T)."""
    both = (gram_a * gram_b).sum(axis=0)
    starts = np.concatenate([[0], np.cumsum(ranks)[:-1]])
    return np.asarray(np.add.reduceat(np.add.reduceat(both, starts, axis=0), starts, axis=1), np.float64)


def truncate(gram_a: Double, gram_b: Double, rank: int | None, energy: float | None) -> Recombination:
    """Best approximation of A^T B of lower rank, by QR of the factors and the SVD of a small core.

    With B B^T = F F^T (Cholesky), the squared singular values s^2 are the eigenvalues of F^T (A A^T) F; for an
    eigenvector y the left vector is A^T F y / s and the right one B^T (A A^T) F y / s^2, so nothing is inverted.

    Args:
        gram_a, gram_b: (L, R, R); weights belong into A's rows.
        rank: at most this many components; None sets no limit.
        energy: the fewest components that keep this share (0, 1] of the squared norm in every layer; None keeps all.
    """
    root = _root(gram_b)
    squares, vectors = np.linalg.eigh(np.swapaxes(root, 1, 2) @ gram_a @ root)
    squares, vectors = np.maximum(squares[:, ::-1], 0), vectors[:, :, ::-1]
    total = squares.sum(axis=1)
    count = squares.shape[1] if rank is None else min(rank, squares.shape[1])
    if energy is not None:
        shares = np.cumsum(squares, axis=1) / np.where(total == 0, 1, total)[:, None]
        enough = np.where(total == 0, 1, (shares < energy - 1e-12).sum(axis=1) + 1)
        count = min(count, int(enough.max()))
    if count == squares.shape[1]:  # nothing is cut: the rows as they are, bit for bit
        return Recombination(None, None, total, total)
    largest = squares[:, :count]
    floor = np.where(total == 0, 1, total * 1e-14)[:, None]
    balance = np.maximum(largest, floor)[:, :, None] ** 0.25  # square root of the singular value
    left = np.swapaxes(root @ vectors[:, :, :count], 1, 2)
    return Recombination(left / balance, left @ gram_a / balance**3, total, largest.sum(axis=1))


def core_space(gram_a: Double, gram_b: Double, ranks: tuple[int, ...]) -> CoreSpace:
    """The shared bases of adapters with these ranks, and their updates in them.

    Args:
        gram_a, gram_b: (L, R, R), R the sum of `ranks`; scales belong into A's rows, weights do not.
    """
    owner = np.repeat(np.arange(len(ranks)), ranks)
    own = owner[:, None] == owner[None, :]
    rows_a, rows_b = _coordinates(gram_a, gram_b * own), _coordinates(gram_b, gram_a * own)
    cores = np.stack([np.swapaxes(rows_a[:, owner == i], 1, 2) @ rows_b[:, owner == i] for i in range(len(ranks))])
    to_a, to_b = (np.asarray(np.linalg.inv(rows), np.float64) for rows in (rows_a, rows_b))
    return CoreSpace(to_a, to_b, cores)


def prune(cores: Double, count: int) -> Double:
    """Matrices (..., R, R) with their `count` largest magnitudes, and those equal to the least of them; the rest 0."""
    magnitudes = np.abs(cores).reshape(*cores.shape[:-2], -1)
    if count >= magnitudes.shape[-1]:
        return cores
    least = np.partition(magnitudes, -count, axis=-1)[..., -count, None]
    return np.where((magnitudes >= least).reshape(cores.shape), cores, 0.0)


def weighted_sum(cores: Double, weights: Double) -> Double:
    """Sum of w_i M_i; cores (K, L, R, R), weights (K,)."""
    return np.asarray(np.einsum("k,klij->lij", weights, cores), np.float64)


def disjoint_mean(cores: Double, weights: Double) -> Double:
    """TIES (arXiv 2306.01708): the weighted mean over the entries that agree with the elected sign, times sum |w|.

    The sign is that of the weighted sum. One adapter is left as it is, and where none disagrees the result is the
    weighted sum.

    Args:
        cores: (K, L, R, R).
        weights: (K,), of any sign.
    """
    shape = (-1, 1, 1, 1)
    values, mass = cores * weights.reshape(shape), np.abs(weights).reshape(shape)
    elected = np.where(values.sum(axis=0) >= 0, 1.0, -1.0)
    agree = np.sign(values) == elected
    share = (agree * mass).sum(axis=0)
    mean = np.divide((values * agree).sum(axis=0), share, out=np.zeros_like(share), where=share > 0)
    return np.asarray(mean * mass.sum(), np.float64)


def _coordinates(gram: Double, weighted: Double) -> Double:
    """Rows in the orthonormal basis of their span that sorts directions by how much the updates use them: (L, R, R)."""
    root = _root(gram)
    _, vectors = np.linalg.eigh(np.swapaxes(root, 1, 2) @ weighted @ root)
    return np.asarray(root @ vectors[:, :, ::-1])


def _root(gram: Double) -> Double:
    """F with F F^T = gram, lower triangular and never singular."""
    size = gram.shape[-1]
    largest = np.diagonal(gram, axis1=1, axis2=2).max(axis=1)
    ridge = np.where(largest > 0, _RIDGE * largest, 1.0)
    return np.asarray(np.linalg.cholesky(gram + ridge[:, None, None] * np.eye(size)))
