"""A sequence in a decoder."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Chat, Composer, Request, open_bundle
from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.errors import GenerationError
from tests.generation.models import PROMPTS


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


class Interrupted:
    """A session that Ctrl-C stops before it has computed anything."""

    def run_with_iobinding(self, binding: object) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [2, 6])
def test_ctrl_c_inside_a_pass_leaves_a_cache_that_agrees_with_its_tokens(
    opened: Composer, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    session, run, passes = opened.model.decoder._session, DecoderState._pass, itertools.count(1)
    opened.model._prompts.clear()

    def interrupting(self: DecoderState, ids: Sequence[int], rows: int) -> Any:
        self._session = Interrupted() if next(passes) == interrupted else session
        return run(self, ids, rows)

    chat = Chat(opened, Request(weights={"animals": 1.0}, max_tokens=12))
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(DecoderState, "_pass", interrupting)
        chat.say(" ".join(PROMPTS))
    (prompt,) = opened.model._prompts._prompts
    cached = prompt.state
    cached._session = session
    fresh = opened.model.decoder.start(opened.compose(PROMPTS[0], Request(weights={"animals": 1.0})).merged, 200)
    tokens = list(cached.tokens)
    np.testing.assert_allclose(cached.forward([7]), fresh.forward([*tokens, 7]), atol=1e-4)


def test_a_negative_token_id_is_named(opened: Composer) -> None:
    decoding = opened.model.decoder.start(opened.compose(PROMPTS[0]).merged, 8)
    with pytest.raises(GenerationError, match=r"token id -3 is outside"):
        decoding.forward([1, -3, 2])
    with pytest.raises(GenerationError, match=r"token id 300 is outside"):
        decoding.forward([1, 300, 2])
