"""Answers of examples by their keys; what cannot be read counts as none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.bundle.specs import TaskSpec
from edgecompose.retrieval.answers import ExampleAnswers
from edgecompose.retrieval.examples import Example, text_lines

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(st.lists(texts, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 9), st.data())
def test_each_key_has_its_answer(
    tmp_path_factory: pytest.TempPathFactory, tasks: list[list[str]], gap: int, data: st.DataObject
) -> None:
    path, lines, specs = tmp_path_factory.mktemp("texts") / "texts.jsonl", "", {}
    answers: dict[int, str] = {}
    key = gap
    for number, task in enumerate(tasks):
        lines += text_lines([Example("p", text) for text in task], key)
        specs[str(number)] = TaskSpec({}, key, len(task))
        answers |= dict(enumerate(task, key))
        key += len(task) + gap  # a task that was removed leaves a gap
    path.write_bytes(lines.encode())
    keys = data.draw(st.lists(st.integers(-1, key + 3), max_size=12))
    assert list(ExampleAnswers(path, specs).read(keys)) == [answers[k] for k in keys if k in answers]


@pytest.mark.parametrize(
    "line",
    [
        b'{"key": 1, "prompt": "b"}',
        b'{"key": 2, "prompt": "b", "answer": "x"}',
        b'{"key": 1, "answer": 7}',
        b'{"key": 1, "answer": "\\ud800"}',
        b'{"key": 1, "answer": "\xff"}',
        b'{"key": 1, "answer": "x"',
        b"[1]",
        b"",
        b"[" * 100_000,
        b'{"key": ' + b"1" * 5000 + b"}",
    ],
)
def test_a_line_that_is_none_gives_no_answer(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"key": 0, "answer": "a"}\n' + line + b'\n{"key": 2, "answer": "c"}\n')
    assert list(ExampleAnswers(path, {"t": TaskSpec({}, 0, 3)}).read([2, 1, 0])) == ["c", "a"]


def test_a_file_that_is_cut_or_gone_gives_what_is_left(tmp_path: Path) -> None:
    path, specs = tmp_path / "texts.jsonl", {"t": TaskSpec({}, 0, 3)}
    assert list(ExampleAnswers(path, specs).read([0])) == []
    whole = text_lines([Example("p", text) for text in "abc"], 0)
    path.write_text(whole, encoding="utf-8")
    answers = ExampleAnswers(path, specs)
    assert list(answers.read([0, 2])) == ["a", "c"]
    path.write_text(whole[: len(whole) // 2], encoding="utf-8")
    assert list(answers.read([2, 0])) == ["a"]
    assert list(ExampleAnswers(path, specs).read([0, 1, 2])) == ["a"]
    path.unlink()
    assert list(answers.read([0])) == []


def test_a_line_across_two_reads_is_whole(tmp_path: Path) -> None:
    path, answers = tmp_path / "texts.jsonl", ["a" * 700_000, "b" * 700_000, "c"]  # one of them lies in two chunks
    path.write_text(text_lines([Example("p", text) for text in answers], 5), encoding="utf-8")
    kept = ExampleAnswers(path, {"t": TaskSpec({}, 5, 3)})
    assert list(kept.read([7, 6])) == ["c", answers[1]]
    assert list(kept.read([7, 6, 5, 7])) == ["c", answers[1]], "a MiB is read at most"


def test_a_line_has_what_an_example_has() -> None:
    lines = text_lines([Example("é?", "oui\n"), Example("b", "c", ("c", "d"))], 7)
    assert [json.loads(line) for line in lines.splitlines()] == [
        {"key": 7, "prompt": "é?", "answer": "oui\n"},
        {"key": 8, "prompt": "b", "answer": "c"},
    ]
