"""A sequence in a decoder."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Chat, Composer, Request, open_bundle
from edgecompose.engine.decoding.decoder_pass import PassBinding
from edgecompose.errors import GenerationError
from tests.generation.models import PROMPTS


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


@pytest.mark.parametrize("interrupted", [2, 6])
def test_ctrl_c_inside_a_pass_leaves_a_cache_that_agrees_with_its_tokens(
    opened: Composer, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    run, passes = PassBinding.run, itertools.count(1)
    opened.model._prompts.clear()

    def interrupting(self: PassBinding, *arguments: Any, **options: Any) -> Any:
        if next(passes) == interrupted:
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    chat = Chat(opened, Request(weights={"animals": 1.0}, max_tokens=12))
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(PassBinding, "run", interrupting)
        chat.say(" ".join(PROMPTS))
    (prompt,) = opened.model._prompts._prompts
    cached = prompt.state
    fresh = opened.model.decoder.start(opened.compose(PROMPTS[0], Request(weights={"animals": 1.0})).merged, 200)
    tokens = list(cached.tokens)
    np.testing.assert_allclose(cached.forward([7]), fresh.forward([*tokens, 7]), atol=1e-4)


def test_a_negative_token_id_is_named(opened: Composer) -> None:
    decoding = opened.model.decoder.start(opened.compose(PROMPTS[0]).merged, 8)
    with pytest.raises(GenerationError, match=r"token id -3 is outside"):
        decoding.forward([1, -3, 2])
    with pytest.raises(GenerationError, match=r"token id 300 is outside"):
        decoding.forward([1, 300, 2])


def test_a_step_gives_the_logits_after_each_of_its_tokens(opened: Composer) -> None:
    merged, ids = opened.compose(PROMPTS[0]).merged, [5, 6, 7, 5, 6]
    together, alone = (opened.model.decoder.start(merged, 40) for _ in range(2))
    for state in (together, alone):
        state.forward([1, 2, 3])
    rows = together.step(ids).copy()
    assert rows.shape == (5, opened.bundle.manifest.base.vocabulary)
    np.testing.assert_allclose(rows, [alone.step([token])[0].copy() for token in ids], rtol=1e-4, atol=1e-5)
    assert together.tokens == alone.tokens == [1, 2, 3, *ids]
    together.rewind(5)
    np.testing.assert_allclose(together.step(ids[2:]), rows[2:], rtol=1e-4, atol=1e-5)


def test_a_sequence_knows_how_many_are_written_beside_it(opened: Composer) -> None:
    merged = opened.compose(PROMPTS[0]).merged
    states = [opened.model.decoder.start(merged, 40) for _ in range(3)]
    for state in states:
        state.forward([1, 2, 3])
        state.step([4])
    assert all(state.beside <= 2 for state in states) and states[0].costs is states[1].costs
    for state in states:
        state.leave(keep=0)
    assert [state.beside for state in states] == [0, 0, 0]


def test_room_ends_at_the_capacity_and_where_a_sequence_turns_long(opened: Composer) -> None:
    state = opened.model.decoder.start(opened.compose(PROMPTS[0]).merged, 20)
    assert state.reversible_room == 20
    state.forward([1] * 8)
    assert state.reversible_room == 12
    state.extend(30)
    assert state.reversible_room == 22
    state._spec = dataclasses.replace(state._spec, long_from=10)
    assert state.reversible_room == 2, "its keys are computed again beyond, so that it could not be taken back"
    state._long = True
    assert state.reversible_room == 22
