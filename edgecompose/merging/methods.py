"""The table of merge methods, their parameters, and the content hash of a blend; knows nothing of arrays.

Two families, never called by the same name:

* exact: the methods act on the updates ΔW_i = s_i A_i^T B_i, never formed. Any ranks, any sign of weight, and the
  result does not depend on how an update was factored.
* paper: the methods act on the factors A and B apart, as PEFT's `add_weighted_adapter` does; all but `cat` need
  adapters of one rank and depend on how (A, B) was factored.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from edgecompose.errors import MergeError

#: Weights are rounded to this step before they enter the content hash.
_WEIGHT_STEP = 1e-6


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """One row of the table of methods.

    `parameters` are the fields of MergeSettings that it reads. `ranks` tells what rank the result has: the 'sum' of the
    ranks, the 'same' rank that all adapters must have, or a 'cap'. `cost` names the work for R stacked ranks, K
    adapters of rank r and n values a row.
    """

    name: str
    family: Literal["exact", "paper"]
    parameters: tuple[str, ...]
    ranks: Literal["sum", "same", "cap"]
    cost: str
    source: str

    @property
    def trims(self) -> Literal["prune", "drop"] | None:
        """How entries are dropped before they are combined."""
        if "density" not in self.parameters:
            return None
        return "drop" if "seed" in self.parameters else "prune"


_PEFT = "PEFT add_weighted_adapter"
_PASS = "R n, one pass"
_ROWS = "K r n, one pass"
_VOTES = "K r n, one pass, six operations a value"
_CORE = "2 R^2 n and three decompositions of R x R a layer"
_CORE_SPACE = "Core Space (arXiv 2509.17786)"
_TIES, _DARE = "TIES (arXiv 2306.01708)", "DARE (arXiv 2311.03099)"
METHODS: Mapping[str, MergeMethod] = {
    row.name: row
    for row in (
        MergeMethod("product", "exact", (), "sum", _PASS, "sum of w s A^T B by stacking (arXiv 2410.13025)"),
        MergeMethod(
            "svd", "exact", ("rank", "energy"), "cap", _CORE, "best approximation of product (Eckart and Young, 1936)"
        ),
        MergeMethod("core_ties", "exact", ("density",), "sum", _CORE, f"{_TIES} in {_CORE_SPACE}"),
        MergeMethod("core_prune", "exact", ("density",), "sum", _CORE, f"magnitude pruning in {_CORE_SPACE}"),
        MergeMethod("core_dare", "exact", ("density", "seed"), "sum", _CORE, f"{_DARE} in {_CORE_SPACE}"),
        MergeMethod("cat", "paper", (), "sum", _PASS, f"{_PEFT} 'cat' (arXiv 2602.21222)"),
        MergeMethod("linear", "paper", (), "same", _ROWS, f"{_PEFT} 'linear' (arXiv 2212.04089 on factors)"),
        MergeMethod(
            "ties", "paper", ("density", "majority_sign"), "same", _VOTES, f"{_PEFT} 'ties', {_TIES} on factors"
        ),
        MergeMethod("magnitude_prune", "paper", ("density",), "same", _ROWS, f"{_PEFT} 'magnitude_prune'"),
        MergeMethod(
            "dare_linear", "paper", ("density", "seed"), "same", _ROWS, f"{_PEFT} 'dare_linear', {_DARE} on factors"
        ),
        MergeMethod(
            "dare_ties", "paper", ("density", "seed", "majority_sign"), "same", _VOTES,
            f"{_PEFT} 'dare_ties', {_DARE} on factors",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """A method and its parameters; a method reads only those that its row of METHODS names.

    `density` in (0, 1] is the share of entries that prunes and drops keep; `seed` decides which entries a drop keeps.
    `rank` caps the rank of svd, None being the largest rank of its parts unless `energy` is given; `energy` in (0, 1]
    is the share of the squared norm that svd keeps at least. `norm_guard` rescales the blend of any method to the
    weighted mean norm of its parts.
    """

    method: str = "product"
    density: float = 0.5
    majority_sign: Literal["total", "frequency"] = "total"
    rank: int | None = None
    energy: float | None = None
    seed: int = 0
    norm_guard: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MergeError(f"merge method '{self.method}' is unknown; use one of {', '.join(METHODS)}")
        if not 0 < self.density <= 1:
            raise MergeError(f"density is {self.density}; a number in (0, 1] is wanted")
        if self.majority_sign not in ("total", "frequency"):
            raise MergeError(f"majority sign '{self.majority_sign}' is unknown; use total or frequency")
        if self.rank is not None and self.rank < 1:
            raise MergeError(f"rank is {self.rank}; 1 or more is wanted")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise MergeError(f"energy is {self.energy}; a number in (0, 1] is wanted")
        if self.seed < 0:
            raise MergeError(f"seed is {self.seed}; 0 or more is wanted")

    @property
    def row(self) -> MergeMethod:
        """The method's row in the table."""
        return METHODS[self.method]

    def parameters(self) -> dict[str, Any]:
        """The parameters that the method reads, by name."""
        return {name: getattr(self, name) for name in self.row.parameters}


def effective(settings: MergeSettings, adapters: int) -> MergeSettings:
    """The settings that a blend of so many adapters is computed with.

    One adapter is neither pruned nor voted on, as in PEFT; without adapters there is nothing to merge.
    """
    if adapters == 0:
        return MergeSettings()
    if adapters == 1 and settings.row.trims:
        return replace(settings, method="linear" if settings.row.family == "paper" else "product")
    return settings


def composition_digest(adapters: Mapping[str, str], weights: Mapping[str, float], settings: MergeSettings) -> str:
    """Content hash (sha256, hexadecimal) of a blend: equal where the same numbers are computed.

    The order of adapters does not matter.

    Args:
        adapters: name -> digest of the adapter's file.
        weights: name -> weight, rounded to 1e-6 for the hash.
    """
    settings = effective(settings, len(adapters))
    blend = sorted((digest, _hashed_weight(weights[name])) for name, digest in adapters.items())
    method = "product" if settings.method == "cat" else settings.method
    content = {"blend": blend, "method": method, "norm_guard": settings.norm_guard, **settings.parameters()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hashed_weight(weight: float) -> int | str:
    return round(weight / _WEIGHT_STEP) if math.isfinite(weight) else str(weight)
