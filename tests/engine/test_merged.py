"""A blend in one buffer: places of factors, and copies of them."""

from __future__ import annotations

import numpy as np
import pytest

from edgecompose.engine.merged import MergedAdapter, require_adapters
from edgecompose.errors import MergeError
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from tests.factories import GROUPS, make_adapter


def test_factors_do_not_overlap_and_lie_inside_the_buffer(merger: Merger) -> None:
    merged = merger.merge([make_adapter("one"), make_adapter("two", rank=2)], [0.5, -1.0], MergeSettings())
    spans = sorted(
        (offset, offset + int(np.prod(shape)))
        for module in merged.modules.values()
        for offset, shape in (module.place("A"), module.place("B"))
    )
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert spans[0][0] >= 0 and spans[-1][1] <= merged.buffer.numpy().size
    values = merged.buffer.numpy()
    for group in GROUPS:
        a, b = merged.factors()[group.name]
        assert a.shape == (group.layers, 6, group.n_in) and b.shape == (group.layers, 6, group.n_out)
        offset, shape = merged.modules[group.name].place("A")
        assert np.array_equal(values[offset : offset + a.size].reshape(shape), a)
        a[:] = 0  # a copy: the blend stays
        assert merged.factors()[group.name][0].any()


def test_a_blend_of_nothing_cannot_be_written() -> None:
    empty = MergedAdapter({}, "none")
    assert empty.factors() == {}
    with pytest.raises(MergeError, match="no adapter"):
        require_adapters(empty)
