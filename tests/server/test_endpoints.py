"""Endpoints of the table, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")


from edgecompose.retrieval.embedder import Embedder
from tests.server.served import PROMPT, SETTINGS, TALK, Served, serving


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    with serving(bundle, SETTINGS) as result:
        yield result


def test_embeddings_through_the_official_client(served: Served) -> None:
    result = served.client().embeddings.create(model="any", input=[PROMPT, "hello"])
    for one, text in zip(result.data, (PROMPT, "hello"), strict=True):
        np.testing.assert_array_equal(
            np.asarray(one.embedding, np.float32), served.composer.retriever.embedder.embed(text)
        )
    assert result.usage.prompt_tokens == sum(
        len(served.composer.retriever.embedder.tokens(text)) for text in (PROMPT, "hello")
    )
    plain = served.client().embeddings.create(model="any", input=PROMPT, encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(result.data[0].embedding)


def test_the_blend_alone(served: Served) -> None:
    result = served.post("/v1/compose", {"messages": TALK}).json()
    composition = served.composer.compose(PROMPT)
    assert result["composition"] == composition.merged.digest
    assert result["weights"] == dict(composition.retrieval.weights) and result["prompt"] == PROMPT


def test_embeddings_are_tokenised_away_from_the_event_loop_and_the_encoder_is_opened_under_its_lock(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, tokenised = [], []
    init, tokens = Embedder.__init__, Embedder.tokens

    def opening(self: Embedder, *arguments: Any, **options: Any) -> None:
        opened.append(served.composer.retriever._loading._is_owned())  # type: ignore[attr-defined]
        init(self, *arguments, **options)

    def tokenising(self: Embedder, text: str) -> list[int]:
        with contextlib.suppress(RuntimeError):
            tokenised.append(asyncio.get_running_loop())
        return tokens(self, text)

    monkeypatch.setattr(Embedder, "__init__", opening)
    monkeypatch.setattr(Embedder, "tokens", tokenising)
    served.composer.release_embedder()
    answer = served.post("/v1/embeddings", {"model": "any", "input": ["a cat", "two dogs bark"]})
    assert answer.status_code == 200 and len(answer.json()["data"]) == 2
    assert (opened, tokenised) == ([True], [])
