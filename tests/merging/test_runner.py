"""Runs merge graphs on arrays of the host and on memory of the device."""

from __future__ import annotations

import numpy as np
import pytest

from edgecompose.engine.device import choose_device
from edgecompose.merging.runner import GraphRunner

DEVICE = choose_device("cpu")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_array_is_copied_to_an_address(dtype: type[np.uint8 | np.float32]) -> None:
    values = np.arange(12, dtype=dtype).reshape(3, 4)
    target = DEVICE.place(np.zeros((3, 4), dtype))
    GraphRunner(DEVICE).copy(DEVICE.place(values), target.data_ptr())
    assert np.array_equal(target.numpy(), values)


def test_all_items_are_mapped_and_an_error_comes_back() -> None:
    runner, seen = GraphRunner(DEVICE), list[int]()
    runner.map(seen.append, range(50))
    assert sorted(seen) == list(range(50))
    with pytest.raises(ZeroDivisionError):
        runner.map(lambda item: 1 // item, [1, 0])
