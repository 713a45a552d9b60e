"""The tasks that a prompt resembles, and what is cached of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgecompose import Composer, Request, open_bundle
from edgecompose.errors import RetrievalError, UnknownAdapter
from edgecompose.settings import RetrievalSettings
from tests.fixtures_tiny import TASKS
from tests.recipes import NEAREST, PROMPT


@pytest.fixture(scope="module")
def composer(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as opened:
        yield opened


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_of_a_task_finds_its_task(composer: Composer, task: str) -> None:
    for prompt in TASKS[task]:
        retrieval = composer.retrieve(prompt, NEAREST)
        assert [n.task for n in retrieval.neighbours] == [task]
        assert retrieval.neighbours[0].similarity == pytest.approx(1, abs=2e-3)
        assert retrieval.weights == {task: pytest.approx(1)}


def test_an_excluded_task_is_left_out(composer: Composer) -> None:
    retrieval = composer.retrieve(PROMPT, Request(exclude=("animals",), retrieval=RetrievalSettings(neighbours=50)))
    assert {n.task for n in retrieval.neighbours} == {"numbers", "colours"}
    assert len(retrieval.neighbours) == 9
    assert "animals" not in retrieval.weights
    with pytest.raises(UnknownAdapter, match="no task 'absent'"):
        composer.retrieve(PROMPT, Request(exclude=("absent",)))
    with pytest.raises(RetrievalError, match="no example is left"):
        composer.retrieve(PROMPT, Request(exclude=tuple(TASKS)))


def test_vectors_in_the_index_are_those_of_the_embedder(composer: Composer) -> None:
    query = composer.retriever.embedder.embed(PROMPT)
    (nearest,) = composer.retriever.index.search(query, 1)
    assert nearest.key == 0
    assert nearest.similarity == pytest.approx(1, abs=2e-3)
    assert np.linalg.norm(query) == pytest.approx(1, abs=1e-5)


def test_a_prompt_seen_before_is_neither_embedded_nor_searched_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = TASKS["numbers"][0]
    with open_bundle(bundle, device="cpu") as opened:
        first = opened.retrieve(prompt)
        assert opened.compose(prompt).merged is opened.compose(prompt).merged

        def refuse(text: str) -> None:
            raise AssertionError(f"embedded again: {text}")

        monkeypatch.setattr(opened.retriever.embedder, "embed_tokens", refuse)
        assert opened.retrieve(prompt) == first
        for other in (
            Request(exclude=("numbers",)),
            Request(retrieval=RetrievalSettings(routing_temperature=0.1)),
            Request(retrieval=RetrievalSettings(nucleus=0.5)),
        ):
            assert opened.retrieve(prompt, other) != first
        with pytest.raises(AssertionError, match="embedded again"):
            opened.retrieve(TASKS["colours"][0])
