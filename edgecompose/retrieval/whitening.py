"""The metric of an index: scales down directions in which the examples of a task vary.

Within-class covariance normalisation (Hatch et al., 2006): with S the mean covariance of the vectors of one task
around that task's mean, a vector x becomes (x - m) S^(-1/2). Distances between the results are Mahalanobis distances
under S: a topic, which examples of one task do not share, is scaled down; the wording of a task, which they do, is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from edgecompose.errors import RetrievalError
from edgecompose.guard.tensors import tensors_of

Float = npt.NDArray[np.float32]
#: The largest magnitude of a number of a whitening; squared norms of what it maps stay finite in float32.
_LARGEST = 1e6


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """`mean` (d,) is taken off a vector, then `matrix` (d, k) is applied; both float32."""

    mean: Float
    matrix: Float

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or self.mean.shape != self.matrix.shape[:1]:
            raise RetrievalError(
                f"whitening has a mean of shape {self.mean.shape} and a matrix of shape {self.matrix.shape}; "
                "expected (d,) and (d, k); export the bundle again"
            )
        largest = float(np.maximum(np.abs(self.mean).max(initial=0), np.abs(self.matrix).max(initial=0)))
        if not largest <= _LARGEST:  # NaN is not
            raise RetrievalError(
                f"whitening holds numbers that are not finite, or reach {largest:g}; expected at most {_LARGEST:g}; "
                "export the bundle again"
            )
        if not np.abs(self.matrix).max(initial=0) >= 1 / _LARGEST:
            raise RetrievalError("whitening maps every vector to zero, or next to it; export the bundle again")

    def __call__(self, vectors: Float) -> Float:
        """Vectors (..., d) in the index's space (..., k), at unit norm (a zero vector stays zero)."""
        turned = (vectors - self.mean) @ self.matrix
        norms = np.linalg.norm(turned, axis=-1, keepdims=True)
        return np.asarray(turned / np.where(norms == 0, 1, norms), np.float32)


def fit_whitening(vectors: Float, tasks: Sequence[int], *, shrinkage: float, dimension: int | None = None) -> Whitening:
    """The whitening of labelled vectors.

    Args:
        vectors: (n, d), finite.
        tasks: n labels 0, 1, ...; at least two vectors of one label.
        shrinkage: in (0, 1], the share of the covariance that is replaced by its mean eigenvalue times the identity.
        dimension: k; the directions along which the whitened vectors vary most are kept. None keeps all.

    Raises:
        RetrievalError: nothing to learn from, or a parameter out of range.
    """
    labels = np.asarray(tasks)
    if vectors.ndim != 2 or labels.shape != vectors.shape[:1] or len(set(tasks)) == len(tasks):
        raise RetrievalError(
            f"whitening cannot be fitted to vectors of shape {vectors.shape} with {labels.size} labels; "
            "expected (n, d) vectors and n labels, some of them equal"
        )
    width = vectors.shape[1]
    directions = width if dimension is None else dimension
    if not (0 < shrinkage <= 1 and 1 <= directions <= width):
        raise RetrievalError(f"shrinkage {shrinkage} or dimension {directions} is out of range (0, 1] or 1 .. {width}")
    exact = vectors.astype(np.float64)
    mean = exact.mean(axis=0)
    within = exact.copy()
    for label in np.unique(labels):
        within[labels == label] -= exact[labels == label].mean(axis=0)
    covariance = within.T @ within / len(within)
    level = np.trace(covariance) / width
    values, turns = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * (level or 1.0) * np.eye(width))
    matrix = turns * np.maximum(values, np.finfo(np.float64).tiny) ** -0.5 @ turns.T
    if directions < width:
        turned = (exact - mean) @ matrix
        matrix = matrix @ np.linalg.eigh(turned.T @ turned)[1][:, ::-1][:, :directions]
    return Whitening(mean.astype(np.float32), matrix.astype(np.float32))


def save_whitening(path: Path, whitening: Whitening) -> None:
    """Write a whitening as safetensors."""
    path.write_bytes(save({"mean": whitening.mean, "matrix": np.ascontiguousarray(whitening.matrix)}))


def load_whitening(path: Path, rows: int, columns: int) -> Whitening:
    """Read a whitening from (`rows`,) to (`columns`,).

    Raises:
        RetrievalError: the file cannot be read, or is of another shape.
    """
    try:
        tensors, _ = tensors_of(path.read_bytes(), f"whitening '{path.name}'", RetrievalError)
    except OSError as error:
        raise RetrievalError(f"whitening '{path.name}' cannot be read: {error}; export the bundle again") from error
    if set(tensors) != {"mean", "matrix"} or any(tensor.dtype != np.float32 for tensor in tensors.values()):
        held = ", ".join(f"{name!r:.40} {tensor.dtype}" for name, tensor in tensors.items())
        raise RetrievalError(
            f"whitening '{path.name}' cannot be read: it holds {held or 'nothing'}, expected mean and matrix in "
            "float32; export the bundle again"
        )
    whitening = Whitening(tensors["mean"], tensors["matrix"])
    if whitening.matrix.shape != (rows, columns):
        raise RetrievalError(
            f"whitening '{path.name}' is of shape {whitening.matrix.shape}, expected ({rows}, {columns}); "
            "export the bundle again"
        )
    return whitening
