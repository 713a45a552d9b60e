"""A sequence in a decoder."""

from __future__ import annotations

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
