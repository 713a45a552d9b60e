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
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from edgecompose.errors import MergeError
from edgecompose.settings import MergeSettings

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
        return "drop" if "dare_seed" in self.parameters else "prune"


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
        MergeMethod("core_dare", "exact", ("density", "dare_seed"), "sum", _CORE, f"{_DARE} in {_CORE_SPACE}"),
        MergeMethod("cat", "paper", (), "sum", _PASS, f"{_PEFT} 'cat' (arXiv 2602.21222)"),
        MergeMethod("linear", "paper", (), "same", _ROWS, f"{_PEFT} 'linear' (arXiv 2212.04089 on factors)"),
        MergeMethod(
            "ties", "paper", ("density", "majority_sign"), "same", _VOTES, f"{_PEFT} 'ties', {_TIES} on factors"
        ),
        MergeMethod("magnitude_prune", "paper", ("density",), "same", _ROWS, f"{_PEFT} 'magnitude_prune'"),
        MergeMethod(
            "dare_linear", "paper", ("density", "dare_seed"), "same", _ROWS,
            f"{_PEFT} 'dare_linear', {_DARE} on factors",
        ),
        MergeMethod(
            "dare_ties", "paper", ("density", "dare_seed", "majority_sign"), "same", _VOTES,
            f"{_PEFT} 'dare_ties', {_DARE} on factors",
        ),
    )
}  # fmt: skip


def method_of(settings: MergeSettings) -> MergeMethod:
    """The row of a method.

    Raises:
        MergeError: no row has that name.
    """
    if settings.method not in METHODS:
        raise MergeError(f"merge method '{settings.method}' is unknown; use one of {', '.join(METHODS)}")
    return METHODS[settings.method]


def parameters_of(settings: MergeSettings) -> dict[str, Any]:
    """The parameters that the method reads, by name."""
    return {name: getattr(settings, name) for name in method_of(settings).parameters}


def require_parameters(names: Collection[str], methods: Collection[str]) -> None:
    """Make sure that merge settings have an effect.

    Args:
        names: settings that a caller names, of `MergeSettings`.
        methods: those that may read them.

    Raises:
        MergeError: no method of these reads one of the settings.
    """
    read = {"method", "norm_guard"}.union(*(METHODS[method].parameters for method in methods))
    for name in names:
        if name not in read:
            readers = ", ".join(row.name for row in METHODS.values() if name in row.parameters)
            raise MergeError(
                f"{name} has no effect on method {', '.join(methods)}; leave it out, or use one of {readers}"
            )


def effective(settings: MergeSettings, adapters: int) -> MergeSettings:
    """The settings that a blend of so many adapters is computed with.

    One adapter is neither pruned nor voted on, as in PEFT; without adapters there is nothing to merge.
    """
    if adapters == 0:
        return MergeSettings()
    row = method_of(settings)
    if adapters == 1 and row.trims:
        return replace(settings, method="linear" if row.family == "paper" else "product")
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
    content = {"blend": blend, "method": method, "norm_guard": settings.norm_guard, **parameters_of(settings)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hashed_weight(weight: float) -> int | str:
    return round(weight / _WEIGHT_STEP) if math.isfinite(weight) else str(weight)
