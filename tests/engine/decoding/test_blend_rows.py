"""The factors of several blends side by side."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.bundle.specs import SlotGroup
from edgecompose.engine.decoding.blend_rows import RANK_STEP, BlendRows, is_padded, padded_ranks
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import SIDES, MergedAdapter, MergedModule
from edgecompose.engine.slots import slot_name

CPU = choose_device("cpu")
GROUPS = (SlotGroup("q_proj", 2, n_in=6, n_out=4), SlotGroup("up_proj", 2, n_in=6, n_out=10))


def blend(seed: int, ranks: dict[str, int]) -> MergedAdapter:
    modules, end = {}, 0
    for group in GROUPS:
        rank = ranks.get(group.name, 0)
        if rank:
            start_b = end + 2 * rank * group.n_in
            modules[group.name] = MergedModule(
                layers=2, rank=rank, n_in=group.n_in, n_out=group.n_out, offset_a=end, offset_b=start_b
            )
            end = start_b + 2 * rank * group.n_out
    buffer = CPU.place(np.random.default_rng(seed).normal(size=max(end, 1)).astype(np.float32))
    return MergedAdapter(modules, f"{seed}/{ranks}", buffer)


class Bound:
    """What is bound to each slot: copies of the memory, by name."""

    def __init__(self, rows: BlendRows, count: int) -> None:
        self.values: dict[str, np.ndarray] = {}
        rows.bind(self, count)

    def bind_input(
        self, name: str, kind: str, number: int, dtype: type[np.float32], shape: tuple[int, ...], address: int
    ) -> None:
        import ctypes

        memory = (ctypes.c_float * math.prod(shape)).from_address(address)
        self.values[name] = np.array(memory, np.float32).reshape(shape)


RANKS = st.fixed_dictionaries({}, optional={group.name: st.integers(1, 20) for group in GROUPS})


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), RANKS), min_size=1, max_size=5), min_size=1, max_size=4))
def test_every_row_has_its_blend_followed_by_zeros(placings: list[list[tuple[int, dict[str, int]]]]) -> None:
    """Whatever was placed before."""
    rows = BlendRows(GROUPS, CPU)
    for placing in placings:
        blends = [blend(seed, ranks) for seed, ranks in placing]
        rows.place(blends)
        bound = Bound(rows, len(blends)).values
        names = {name for one in blends for name in one.modules}
        assert {name.split(".")[2] for name in bound} == names
        for name in names:
            for layer in range(2):
                for side in SIDES:
                    value = bound[slot_name(layer, name, side)]
                    assert value.shape[:2] == (len(blends), 1) and value.shape[2] % RANK_STEP == 0
                    for row, one in enumerate(blends):
                        rank = one.modules[name].rank if name in one.modules else 0
                        assert not value[row, 0, rank:].any()
                        if rank:
                            expected = one.factors()[name][SIDES.index(side)][layer]
                            np.testing.assert_array_equal(value[row, 0, :rank], expected)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=12))
def test_memory_is_that_of_twice_the_blends_at_most(placings: list[tuple[int, int]]) -> None:
    """However often ranks and numbers changed before."""
    rows = BlendRows(GROUPS[:1], CPU)
    for count, rank in placings:
        rows.place([blend(seed, {"q_proj": rank}) for seed in range(count)])
    most = max(count for count, _ in placings)
    assert rows.bytes <= 4 * 2 * most * 2 * 48 * (6 + 4) + 4 * 64


def test_a_blend_that_is_in_its_row_is_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, one, other = BlendRows(GROUPS, CPU), blend(1, {"q_proj": 3}), blend(2, {"q_proj": 8})
    rows.place([one, other])
    version, copied = rows.version, list[int]()
    monkeypatch.setattr(BlendRows, "_copy", lambda self, row, blend: copied.append(row))
    rows.place([one, other])
    rows.place([one])
    assert not copied and rows.version == version
    rows.place([other, other])
    assert copied == [0] and rows.version == version
    rows.clear()
    assert rows.bytes == 0 and rows.version != version


def test_ranks_are_padded_to_the_largest() -> None:
    blends = [blend(1, {"q_proj": 3}), blend(2, {"q_proj": 9, "up_proj": 8}), blend(3, {})]
    assert padded_ranks(blends) == {"q_proj": 16, "up_proj": 8}
    assert [is_padded(one) for one in blends] == [False, False, True] and is_padded(blend(4, {"up_proj": 16}))
