"""Adapters to merge, and the updates of blends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.adapter import Adapter
from edgecompose.bundle.quantization import Bits
from edgecompose.bundle.specs import SlotGroup
from edgecompose.engine.merged import MergedAdapter
from tests.factories import GROUPS, make_adapter

Float = npt.NDArray[np.float32]
WEIGHTS = (0.7, -0.4, 0.25, 1.3)
BITS: dict[str, tuple[Bits, ...]] = {"int4": (4, 4, 4, 4), "int8": (8, 8, 8, 8), "mixed": (8, 4, 4, 8)}
SCALINGS = ([2.0, 0.5, 1.0], [1.5, 1.5, 1.5], [0.1, 4.0, 1.0], [1.0, 2.0, 3.0])


def make_adapters(bits: Sequence[Bits], groups: Sequence[SlotGroup] = GROUPS) -> list[Adapter]:
    return [
        make_adapter(f"adapter{i}", groups=groups, bits=b, scaling=SCALINGS[i][: groups[0].layers])
        for i, b in enumerate(bits)
    ]


def arrays_of(merged: MergedAdapter) -> dict[str, tuple[Float, Float]]:
    return {name: (a.transpose(0, 2, 1), b) for name, (a, b) in merged.factors().items()}


def deltas(merged: MergedAdapter) -> dict[str, Float]:
    return {name: np.matmul(a, b) for name, (a, b) in arrays_of(merged).items()}


def assert_close(result: npt.NDArray[np.floating], expected: npt.NDArray[np.floating], tolerance: float = 2e-6) -> None:
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance * max(float(np.abs(expected).max()), 1e-6))
