"""Parity of two devices: every merge method, at its defaults and at the edges of its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.engine.parity import Compared, one_line
from benchmarks.measuring.adapters import gaussian_adapter, random_adapter, slot_groups
from edgecompose.bundle.adapter import Adapter
from edgecompose.bundle.quantization import Bits
from edgecompose.bundle.specs import SlotGroup
from edgecompose.engine.device import Device
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import METHODS, method_of, parameters_of
from edgecompose.settings import MergeSettings

Float = npt.NDArray[np.float32]
Factors = Mapping[str, tuple[Float, Float]]
#: Largest difference over largest magnitude that sums of float32 in another order may give. Products that are rounded
#: to TF32 differ by about 1e-3, and fail.
TOLERANCE = 1e-5
#: Where Gram matrices in float32 are decomposed; with rounding noise of 1e-7 put into them on a CPU, core_ties moves by
#: up to 1e-2 (a vote in core space that cancels but for rounding goes either way), the others by up to 5e-5.
METHOD_TOLERANCE = {"svd": 2e-4, "core_prune": 2e-4, "core_dare": 2e-4, "core_ties": 5e-2}
#: Share of entries that may differ by any amount where signs are elected: votes that cancel but for rounding.
FLIPS = 1e-5
WEIGHTS = (0.7, -0.4, 1.3, 0.2)
#: A tall, a narrow and a wide module; blocks of 32 values.
_EVEN = (
    SlotGroup("q_proj", layers=3, n_in=64, n_out=96),
    SlotGroup("k_proj", layers=3, n_in=96, n_out=32),
    SlotGroup("down_proj", layers=3, n_in=160, n_out=64),
)
#: Blocks of 8, 16 and 2 values.
_UNEVEN = (
    SlotGroup("q_proj", layers=2, n_in=24, n_out=40),
    SlotGroup("v_proj", layers=2, n_in=48, n_out=6),
    SlotGroup("up_proj", layers=2, n_in=40, n_out=16),
)


@dataclass(frozen=True, slots=True)
class MethodParity(Compared):
    """The worst of all cases of a method; `error` is infinite if it failed, and `worst` says why."""

    method: str
    cases: int
    error: float
    tolerance: float
    worst: str


def merge_parity(device: Device, reference: Device) -> Iterator[MethodParity]:
    """Every method of METHODS on both devices: rows resident on the one, gathered on the host for the other."""
    merger, expected = Merger(device, resident=True), Merger(reference, resident=False)
    pools = adapter_pools()
    for method in METHODS:
        count, error, worst = 0, 0.0, ""
        for name, adapters, settings in cases(method, pools):
            weights = WEIGHTS[: len(adapters)]
            theirs = expected.merge(adapters, weights, settings).factors()
            try:
                ours = merger.merge(adapters, weights, settings).factors()
                difference, case = relative_error(ours, theirs, settings), name
            except Exception as failure:  # any failure of a kernel or of its result counts as an infinite error
                difference, case = math.inf, f"{name}: {one_line(failure)}"
            count += 1
            if difference > error:
                error, worst = difference, case
        tolerance = METHOD_TOLERANCE.get(method, TOLERANCE)
        yield MethodParity(method, cases=count, error=error, tolerance=tolerance, worst=worst)


def cases(
    method: str, pools: Mapping[str, tuple[Adapter, ...]]
) -> Iterator[tuple[str, tuple[Adapter, ...], MergeSettings]]:
    """The plain method on all pools of adapters that it accepts, and each edge of its parameters on two of them."""
    row = METHODS[method]
    for name, adapters in pools.items():
        if row.plan != "entrywise" or name != "mixed ranks":
            yield name, adapters, MergeSettings(method)
    edges: dict[str, list[MergeSettings]] = {
        "density": [MergeSettings(method, density) for density in (0.1, 0.37, 1.0)],
        "majority_sign": [MergeSettings(method, density, "frequency") for density in (0.5, 1.0)],
        "dare_seed": [MergeSettings(method, dare_seed=7)],
        "rank": [MergeSettings(method, rank=rank) for rank in (1, 5, 1000)],
        "energy": [MergeSettings(method, energy=share) for share in (0.5, 0.95, 1.0)],
    }
    varied = [settings for name in row.parameters for settings in edges.get(name, [])]
    for settings in (*varied, MergeSettings(method, norm_guard=True)):
        text = ", ".join(f"{k}={v}" for k, v in parameters_of(settings).items())
        for name in ("int4", "missing modules"):
            yield f"{name}; {text}{'; norm guard' * settings.norm_guard}", pools[name], settings


def adapter_pools() -> dict[str, tuple[Adapter, ...]]:
    """Random adapters: shapes, ranks, bits, missing modules; all but 'mixed ranks' have one rank each."""
    some = [_EVEN[:2], _EVEN[1:], _EVEN]
    wide = slot_groups("smollm2-135m", 1)

    def draw(name: str, rank: int, bits: Bits, groups: tuple[SlotGroup, ...] = _EVEN) -> Adapter:
        return gaussian_adapter(name, groups, rank=rank, bits=bits)

    return {
        "int4": tuple(draw(f"a{i}", 8, 4) for i in range(3)),
        "int8": tuple(draw(f"b{i}", 8, 8) for i in range(3)),
        "int4 and int8": (draw("c0", 4, 4), draw("c1", 4, 8)),
        "short blocks": tuple(draw(f"d{i}", rank=4, bits=8 if i else 4, groups=_UNEVEN) for i in range(3)),
        "rank 1": tuple(draw(f"e{i}", 1, 4) for i in range(4)),
        "one adapter": (draw("f0", 8, 4),),
        "missing modules": tuple(draw(f"g{i}", rank=6, bits=8, groups=groups) for i, groups in enumerate(some)),
        "mixed ranks": tuple(draw(f"h{i}", rank, 4) for i, rank in enumerate((3, 8, 17))),
        "smollm2-135m": tuple(random_adapter(i, wide, rank=16, bits=4) for i in range(2)),
    }


def relative_error(ours: Factors, theirs: Factors, settings: MergeSettings) -> float:
    """Largest difference over the largest magnitude of the same tensor; infinite where shapes or modules differ.

    Exact methods are compared by the updates A^T B, since their factors are not unique. FLIPS of the entries are left
    out for methods that elect signs.
    """
    if set(ours) != set(theirs):
        return math.inf
    differences = []
    with np.errstate(all="ignore"):  # a value that is not finite is an infinite difference
        for module, factors in theirs.items():
            pairs = zip(_tensors(ours[module], settings), _tensors(factors, settings), strict=True)
            for left, right in pairs:
                if left.shape != right.shape:
                    return math.inf
                largest = max(float(np.abs(right).max()), float(np.finfo(np.float32).tiny))
                differences.append(np.abs(left - right).ravel() / largest)
    values = np.nan_to_num(np.concatenate(differences), nan=np.inf, posinf=np.inf)
    place = values.size - 1 - (int(FLIPS * values.size) if "majority_sign" in method_of(settings).parameters else 0)
    return float(np.partition(values, place)[place])


def _tensors(factors: tuple[Float, Float], settings: MergeSettings) -> tuple[Float, ...]:
    a, b = factors
    return (np.matmul(a.transpose(0, 2, 1), b),) if method_of(settings).family == "exact" else (a, b)
