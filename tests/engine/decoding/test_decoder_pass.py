"""What a pass feeds to the graph."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgecompose.engine.decoding.decoder_pass import PassBinding, PassRow
from edgecompose.errors import BundleError


class Session:
    """Takes what is bound, and gives logits that count up."""

    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}
        self.logits: Any = None
        self.fails = False

    def io_binding(self) -> Session:
        return self

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value.numpy().copy()

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.logits = value

    def clear_binding_inputs(self) -> None:
        self.inputs.clear()

    def clear_binding_outputs(self) -> None:
        self.logits = None

    def run_with_iobinding(self, binding: Session) -> None:
        if self.fails:
            raise RuntimeError("bad shape")
        shape = tuple(self.logits.shape())
        self.logits.update_inplace(np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape))


def binding(session: Session, *, long_from: int | None = None, slots: bool = True) -> PassBinding:
    spec: Any = SimpleNamespace(vocabulary=5, long_from=long_from)
    return PassBinding(session, spec, slots=slots)


def test_rows_of_several_lengths_are_padded_and_only_their_own_tokens_get_logits() -> None:
    session = Session()
    logits = binding(session).run(
        [PassRow([7, 8, 9], past=10, kept=2), PassRow([4], past=3, kept=1), PassRow([0], past=2, kept=0)], (1, 3, 3)
    )
    assert logits.shape == (3, 5)
    assert session.inputs["input_ids"].tolist() == [[7, 8, 9], [4, 0, 0], [0, 0, 0]]
    assert session.inputs["query_seqlens"].tolist() == [4, 2, 2]
    assert session.inputs["seqlens_k"].tolist() == [13, 4, 3]
    assert session.inputs["total_sequence_length"].tolist() == 14
    assert session.inputs["logits_at"].tolist() == [1, 2, 3]
    assert session.inputs["slot_layout"].tolist() == [1, 3, 3]
    assert "long_context" not in session.inputs


def test_frequencies_are_named_where_a_base_has_two_sets_and_slots_where_it_has_any() -> None:
    session = Session()
    passes = binding(session, long_from=8, slots=False)
    for long in (False, True, True, False):
        passes.run([PassRow([1], past=0, kept=1)], (1, 1, 1), long=long)
        assert session.inputs["long_context"].tolist() == [long]
    assert "slot_layout" not in session.inputs
    passes.clear()
    passes.run([PassRow([1], past=0, kept=1)], (1, 1, 1))
    assert session.inputs["long_context"].tolist() == [False]


def test_a_graph_that_fails_is_one_error() -> None:
    session = Session()
    session.fails = True
    with pytest.raises(BundleError, match="the decoder graph cannot be run.*bad shape"):
        binding(session).run([PassRow([1], past=0, kept=1)], (1, 1, 1))
