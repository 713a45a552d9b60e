"""Answers as tokens: in the form of the prompt, each once, and no more than are needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgecompose.generation.drafts.example_tokens import MOST, MOST_CHARACTERS, example_tokens
from edgecompose.generation.tokenizer import Tokenizer
from tests.factories import write_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("raw", [True, False])
def test_answers_are_tokens_as_behind_their_prompts(tokenizer: Tokenizer, raw: bool) -> None:
    ids = list(example_tokens(tokenizer, ["one two", "one two", "three", "one two"], raw=raw))
    space = " " if raw else ""
    assert ids == [tokenizer.encode_continuation(space + text) for text in ("one two", "three")]


def test_no_more_answers_are_read_than_are_needed(tokenizer: Tokenizer) -> None:
    read = []

    def answers(size: int) -> Iterator[str]:
        for number in range(10_000):
            read.append(number)
            yield f"{number} ".ljust(size, "x")

    assert len(list(example_tokens(tokenizer, answers(8), raw=False))) == len(read) == MOST
    read.clear()
    long = list(example_tokens(tokenizer, answers(3_000), raw=False))
    assert len(long) == len(read) == 2
    assert [len(tokenizer.decode(ids)) for ids in long] == [3_000, MOST_CHARACTERS - 3_000]
