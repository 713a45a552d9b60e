"""Reading task examples; an error names the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgecompose.errors import ExportError
from edgecompose.retrieval.examples import Example, read_examples

GOOD = '{"prompt": "2 + 2?", "answer": "4"}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "task.jsonl"


def test_examples_are_read_in_order(path: Path) -> None:
    lines = [GOOD, "", '{"prompt": "é?", "answer": "oui", "choices": ["oui", "non"], "more": 1}', "   ", GOOD]
    path.write_text("\n".join(lines), encoding="utf-8")
    question, choice = Example("2 + 2?", "4"), Example("é?", "oui", ("oui", "non"))
    assert read_examples(path) == [question, choice, question]
    assert read_examples(path, limit=2) == [question, choice]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_endings_of_either_kind(path: Path, ending: str) -> None:
    path.write_bytes((GOOD + ending).encode() * 3)
    assert len(read_examples(path)) == 3


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_only_at_a_line_feed(path: Path, separator: str) -> None:
    example = {"prompt": f"one{separator}two", "answer": "three"}
    path.write_text(json.dumps(example, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_examples(path) == [Example(f"one{separator}two", "three")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("not json", "is not JSON"),
        ("[1]", "is a list"),
        ("7", "is a int"),
        ('{"answer": "4"}', "has no 'prompt'"),
        ('{"prompt": "?"}', "has no 'answer'"),
        ('{"prompt": "  ", "answer": "4"}', "has no 'prompt'"),
        ('{"prompt": "?", "answer": 4}', "has no 'answer'"),
        ('{"prompt": "?", "answer": "4", "choices": "45"}', "'choices'"),
        ('{"prompt": "?", "answer": "4", "choices": [4]}', "'choices'"),
        pytest.param('{"prompt": "?", "answer": ' + "1" * 5000 + "}", "is not JSON", id="5000 digits"),
        pytest.param("[" * 100_000, "is not JSON", id="deep"),
    ],
)
def test_a_bad_line_is_named(path: Path, line: str, message: str) -> None:
    path.write_text(f"{GOOD}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ExportError, match=f"task.jsonl:3.*{message}"):
        read_examples(path)


def test_a_byte_order_mark_is_skipped(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert read_examples(path) == [Example("2 + 2?", "4")]


@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_half_a_surrogate_pair_names_its_line_before_any_work(path: Path, field: str) -> None:
    bad = json.dumps({"prompt": "a", "answer": "b", field: "cut \ud83d"})
    path.write_text("\n".join([GOOD, GOOD, bad, GOOD, GOOD]), encoding="utf-8")
    with pytest.raises(ExportError, match=r"task\.jsonl:3 holds half a surrogate pair"):
        read_examples(path)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_examples_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ExportError, match="task.jsonl"):
        read_examples(path)


def test_an_absent_file_is_refused(path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read"):
        read_examples(path)
