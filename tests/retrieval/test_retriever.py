"""The tasks that a prompt resembles, and what is cached of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgecompose import Composer, Request, open_bundle
from edgecompose.bundle.files import describe_file, read_manifest, write_manifest
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


def test_neighbours_of_the_chosen_tasks_have_their_answers(composer: Composer) -> None:
    retrieval = composer.retrieve(PROMPT)
    near = [neighbour for neighbour in retrieval.neighbours if neighbour.task in retrieval.nucleus]
    assert list(composer.retriever.answers_of(retrieval)) == ["yes"] * len(near) != []
    assert list(composer.retriever.answers_of(dataclasses.replace(retrieval, nucleus={}))) == []
    assert list(composer.retriever.answers_of(dataclasses.replace(retrieval, neighbours=()))) == []


@pytest.mark.parametrize("state", ["damaged", "gone", "of an older version"])
def test_texts_that_cannot_be_read_prevent_no_answer(bundle_copy: Path, state: str) -> None:
    manifest = read_manifest(bundle_copy)
    texts, request = bundle_copy / str(manifest.index.texts), Request(max_tokens=12, raw=True)
    with open_bundle(bundle_copy, device="cpu") as opened:
        expected = opened.run(PROMPT, request).text
    whole = texts.read_text(encoding="utf-8")
    texts.write_text(whole.replace("yes", "yet") if state == "damaged" else whole, encoding="utf-8")
    if state == "of an older version":
        texts.write_text(re.sub(', "answer": "yes"', "", whole), encoding="utf-8")
        files = {**manifest.files, texts.name: describe_file(texts)}
        write_manifest(bundle_copy, dataclasses.replace(manifest, files=files))
    with open_bundle(bundle_copy, device="cpu") as opened:
        if state == "gone":
            texts.unlink()
        assert opened.run(PROMPT, request).text == expected
        assert list(opened.retriever.answers_of(opened.retrieve(PROMPT))) == []
