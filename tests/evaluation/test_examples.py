"""Examples and right answers: laws, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.errors import EvaluationError
from edgecompose.evaluation.examples import (
    EvalExample,
    first_line,
    merge_examples,
    plain_answer,
    read_eval_examples,
)

ONE = {"prompt": "Is it?", "answer": "yes", "choices": ["yes", "no"]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@given(st.text())
def test_a_plain_answer_stays_as_it_is(text: str) -> None:
    plain = plain_answer(text)
    assert plain_answer(plain) == plain
    assert plain_answer(f"  {text}\n") == plain
    assert bool(plain) == bool(text.split())


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  an  apple\ta day", "apple day"),
        ("U.S.", "us"),
        ("the", "the"),
        ("‘rock’ — roll", "rock roll"),
        ("A", "a"),
        ("?!", "?!"),
        ("Theatre", "theatre"),
        ("$5", "5"),
        ("", ""),
    ],
)
def test_what_does_not_count_is_dropped(text: str, plain: str) -> None:
    assert plain_answer(text) == plain


def test_free_text_is_right_by_its_first_line_and_any_alias() -> None:
    example = EvalExample("t", "p", "Barack Obama", aliases=("Obama",))
    assert all(example.is_right(text) for text in ("barack obama.", "\n the Obama\nQuestion: what?", "OBAMA"))
    assert not any(example.is_right(text) for text in ("", "Barack", "Who?\nObama", "Barack Obama and others"))
    assert first_line("\n\n one \r\ntwo") == "one"


def test_a_choice_is_right_as_it_stands() -> None:
    example = EvalExample("t", "p", "Yes.", ("Yes.", "yes"))
    assert example.is_right("Yes.")
    assert not example.is_right("yes")


@given(st.text(), st.text(), st.text())
def test_an_id_names_the_content(task: str, prompt: str, answer: str) -> None:
    one = EvalExample(task, prompt, answer)
    assert one.id == EvalExample(task, prompt, answer).id
    others = [
        EvalExample(f"{task}x", prompt, answer),
        EvalExample(task, f"{prompt}x", answer),
        EvalExample(task, prompt, f"{answer}x"),
        EvalExample(task, prompt, answer, aliases=(answer,)),
        EvalExample(task, prompt, answer, (answer, "x")),
    ]
    assert len({one.id, *(other.id for other in others)}) == 6


def test_examples_are_read(tmp_path: Path) -> None:
    path = tmp_path / "film.v2.jsonl"
    rows = [ONE | {"family": "nli", "n": [1, None]}, {"task": "quiz", "prompt": "Who?", "answer": "A", "choices": None}]
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\r\n", encoding="utf-8")
    assert read_eval_examples(path) == [
        EvalExample("film", "Is it?", "yes", ("yes", "no")),
        EvalExample("quiz", "Who?", "A"),
    ]


def test_a_limit_is_one_for_each_task_and_no_example_counts_twice(tmp_path: Path) -> None:
    rows = [{"task": task, "prompt": f"{i}", "answer": "x"} for i in range(4) for task in "ab"]
    path = write(tmp_path / "x.jsonl", *rows, *rows)
    assert len(read_eval_examples(path)) == 8
    assert [(e.task, e.prompt) for e in read_eval_examples(path, 2)] == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]
    examples = read_eval_examples(path)
    assert merge_examples([examples, examples[:5]]) == examples
    assert len(merge_examples([examples[:1], examples], 3)) == 6


BAD: dict[str, tuple[bytes, str]] = {
    "not JSON": (b'{"prompt": ', "is not JSON"),
    "not UTF-8": (b'{"prompt": "\xff", "answer": "x"}', "is not JSON in UTF-8"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "long integer": (b"1" * 10_000, "is not JSON"),
    "a list": (b'["prompt", "answer"]', "an object with prompt and answer"),
    "null": (b"null", "an object with prompt and answer"),
    "no prompt": (b'{"answer": "x"}', "has no prompt"),
    "no answer": (b'{"prompt": "x"}', "has no answer"),
    "number as answer": (b'{"prompt": "x", "answer": 3}', "answer is 3; expected a text"),
    "blank prompt": (b'{"prompt": " \\n", "answer": "x"}', "prompt is ' \\n'; expected a text"),
    "half a pair": (b'{"prompt": "\\ud800", "answer": "x"}', "half a surrogate pair"),
    "task": (b'{"task": 1, "prompt": "x", "answer": "x"}', "task is 1; expected a text"),
    "escape in the task": (b'{"task": "\\u001b[2J", "prompt": "x", "answer": "x"}', "cannot be shown"),
    "answer elsewhere": (b'{"prompt": "x", "answer": "c", "choices": ["a", "b"]}', "answer 'c' is none of the choices"),
    "one choice": (b'{"prompt": "x", "answer": "a", "choices": ["a"]}', "two or more"),
    "a choice twice": (b'{"prompt": "x", "answer": "a", "choices": ["a", "a"]}', "two or more"),
    "choices as text": (b'{"prompt": "x", "answer": "a", "choices": "abc"}', "choices is 'abc'; expected a list"),
    "blank choice": (b'{"prompt": "x", "answer": "a", "choices": ["a", ""]}', "one of choices is ''"),
    "alias": (b'{"prompt": "x", "answer": "a", "aliases": [null]}', "one of aliases is None"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(tmp_path: Path, case: str) -> None:
    line, message = BAD[case]
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(ONE).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(EvaluationError) as caught:
        read_eval_examples(path, 1)
    assert str(caught.value).startswith(f"{path}:3")
    assert message in str(caught.value)


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    try:
        assert read_eval_examples(path) == []
    except EvaluationError as error:
        assert "any.jsonl:" in str(error)


def test_a_file_without_a_name_needs_a_task(tmp_path: Path) -> None:
    path = write(tmp_path / ".jsonl", ONE)
    with pytest.raises(EvaluationError, match="task is ''"):
        read_eval_examples(path)
    assert read_eval_examples(write(path, ONE | {"task": "named"}))[0].task == "named"
