"""The table of merge methods: a row holds the functions of a method; and the content hash of a blend.

Two families, never called by the same name:

* exact: the methods act on the updates ΔW_i = s_i A_i^T B_i, never formed. Any ranks, any sign of weight, and the
  result does not depend on how an update was factored.
* factor-wise: the methods act on the factors A and B apart, as PEFT's `add_weighted_adapter` does; all but `cat` need
  adapters of one rank and depend on how (A, B) was factored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import LARGEST_WEIGHT
from edgecompose.errors import MergeError
from edgecompose.merging.core_space import disjoint_mean, weighted_sum
from edgecompose.merging.sparsify import MAGNITUDE, RANDOM, Sparsify
from edgecompose.settings import MergeSettings

Double = npt.NDArray[np.float64]
#: Weights are rounded to this step before they enter the content hash.
_WEIGHT_STEP = 1e-6


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """One row.

    Attributes:
        parameters: the fields of MergeSettings that the method reads.
        plan: how `Merger` computes it. 'stack' puts the rows of all adapters one after another; 'entrywise' combines
            rows of one rank by `graph`; 'truncate' and 'core' recombine the stacked rows by small matrices.
        cost: the work for R stacked ranks, K adapters of rank r and n values a row.
        source: the paper or program that defines it.
        sparsify: drops entries first; None keeps all.
        graph: the merge graph of 'entrywise', by settings.
        combine: updates (K, L, R, R) and weights (K,) -> (L, R, R), of 'core'.
        single: the method that one adapter alone is computed with, where it is another.
        gram_norm: the Gram matrix of the updates gives the norm of the blend.
    """

    name: str
    family: Literal["exact", "factor-wise"]
    parameters: tuple[str, ...]
    plan: Literal["stack", "entrywise", "truncate", "core"]
    cost: str
    source: str
    sparsify: Sparsify | None = None
    graph: Callable[[MergeSettings], str] | None = None
    combine: Callable[[Double, Double], Double] | None = None
    single: str | None = None
    gram_norm: bool = False


def _linear(settings: MergeSettings) -> str:
    return "linear"


def _ties(settings: MergeSettings) -> str:
    return f"ties_{settings.majority_sign}"


_PASS = "R n, one pass"
_ROWS = "K r n, one pass"
_VOTES = "K r n, one pass, six operations a value"
_CORE = "2 R^2 n and three decompositions of R x R a layer"
_PEFT = "PEFT add_weighted_adapter"
_CORE_SPACE = "Core Space (arXiv 2509.17786)"
_TIES, _DARE = "TIES (arXiv 2306.01708)", "DARE (arXiv 2311.03099)"
METHODS: Mapping[str, MergeMethod] = {
    row.name: row
    for row in (
        MergeMethod(
            name="product",
            family="exact",
            parameters=(),
            plan="stack",
            cost=_PASS,
            source="sum of w s A^T B by stacking (arXiv 2410.13025)",
            gram_norm=True,
        ),
        MergeMethod(
            name="svd",
            family="exact",
            parameters=("rank", "energy"),
            plan="truncate",
            cost=_CORE,
            source="best approximation of product (Eckart and Young, 1936)",
        ),
        MergeMethod(
            name="core_ties",
            family="exact",
            parameters=("density",),
            plan="core",
            cost=_CORE,
            source=f"{_TIES} in {_CORE_SPACE}",
            sparsify=MAGNITUDE,
            combine=disjoint_mean,
            single="product",
        ),
        MergeMethod(
            name="core_prune",
            family="exact",
            parameters=("density",),
            plan="core",
            cost=_CORE,
            source=f"magnitude pruning in {_CORE_SPACE}",
            sparsify=MAGNITUDE,
            combine=weighted_sum,
            single="product",
        ),
        MergeMethod(
            name="core_dare",
            family="exact",
            parameters=("density", "dare_seed"),
            plan="core",
            cost=_CORE,
            source=f"{_DARE} in {_CORE_SPACE}",
            sparsify=RANDOM,
            combine=weighted_sum,
            single="product",
        ),
        MergeMethod(
            name="cat",
            family="factor-wise",
            parameters=(),
            plan="stack",
            cost=_PASS,
            source=f"{_PEFT} 'cat' (arXiv 2602.21222)",
            gram_norm=True,
        ),
        MergeMethod(
            name="linear",
            family="factor-wise",
            parameters=(),
            plan="entrywise",
            cost=_ROWS,
            source=f"{_PEFT} 'linear' (arXiv 2212.04089 on factors)",
            graph=_linear,
        ),
        MergeMethod(
            name="ties",
            family="factor-wise",
            parameters=("density", "majority_sign"),
            plan="entrywise",
            cost=_VOTES,
            source=f"{_PEFT} 'ties', {_TIES} on factors",
            sparsify=MAGNITUDE,
            graph=_ties,
            single="linear",
        ),
        MergeMethod(
            name="magnitude_prune",
            family="factor-wise",
            parameters=("density",),
            plan="entrywise",
            cost=_ROWS,
            source=f"{_PEFT} 'magnitude_prune'",
            sparsify=MAGNITUDE,
            graph=_linear,
            single="linear",
        ),
        MergeMethod(
            name="dare_linear",
            family="factor-wise",
            parameters=("density", "dare_seed"),
            plan="entrywise",
            cost=_ROWS,
            source=f"{_PEFT} 'dare_linear', {_DARE} on factors",
            sparsify=RANDOM,
            graph=_linear,
            single="linear",
        ),
        MergeMethod(
            name="dare_ties",
            family="factor-wise",
            parameters=("density", "dare_seed", "majority_sign"),
            plan="entrywise",
            cost=_VOTES,
            source=f"{_PEFT} 'dare_ties', {_DARE} on factors",
            sparsify=RANDOM,
            graph=_ties,
            single="linear",
        ),
    )
}


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
    single = method_of(settings).single
    if adapters == 1 and single is not None:
        return replace(settings, method=single)
    return settings


def composition_digest(adapters: Mapping[str, str], weights: Mapping[str, float], settings: MergeSettings) -> str:
    """Content hash (sha256, hexadecimal) of a blend: equal where the same numbers are computed.

    The order of adapters does not matter.

    Args:
        adapters: name -> digest of the adapter's file.
        weights: name -> weight, rounded to 1e-6 for the hash.

    Raises:
        MergeError: a weight that is not finite, or too large.
    """
    check_weights(weights)
    settings = effective(settings, len(adapters))
    blend = sorted((digest, round(weights[name] / _WEIGHT_STEP)) for name, digest in adapters.items())
    method = "product" if settings.method == "cat" else settings.method
    content = {"blend": blend, "method": method, "norm_guard": settings.norm_guard, **parameters_of(settings)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_weights(weights: Mapping[str, float]) -> None:
    """Make sure that weights can be computed with.

    Raises:
        MergeError: one is not finite, or beyond 1e6 in magnitude; the message names its adapter.
    """
    bad = [f"{name}={weight:g}" for name, weight in weights.items() if not abs(weight) <= LARGEST_WEIGHT]
    if bad:
        raise MergeError(f"weights that are not finite, or beyond {LARGEST_WEIGHT:g}: {', '.join(bad)}; give others")
