"""JSON Lines files: places of lines, and files that a run appends to again after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.bundle import jsonl
from edgecompose.bundle.jsonl import open_resumable, read_lines
from edgecompose.errors import ApiError

START = b'{"id": '
ROWS = st.lists(st.builds(lambda key, text: {"id": key, "text": text}, st.integers(), st.text()), max_size=5)


def append(path: Path, *rows: Any) -> list[Any]:
    """What the file held before the rows were appended."""
    with open_resumable(path, lambda row: row["id"], start=START, error=ApiError, content="row of a test") as file:
        for row in rows:
            file.append(json.dumps(row))
        return list(file.earlier)


@given(ROWS)
def test_lines_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert [value for _, value in read_lines(path, ApiError)] == rows


def test_places_count_blank_lines_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\n\n  \n{"id": 2}')
    assert list(read_lines(path, ApiError)) == [(f"{path}:1", {"id": 1}), (f"{path}:4", {"id": 2})]


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[" * 100_000])
def test_a_line_that_is_not_json_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\n' + line)
    with pytest.raises(ApiError, match=r"rows\.jsonl:2 is not JSON in UTF-8"):
        list(read_lines(path, ApiError))


@pytest.mark.parametrize("text", ['{"id": "\\ud83d"}', '{"\\udc00": 1}', '["x", {"a": ["\\ud83d\\u0020"]}]'])
def test_half_a_surrogate_pair_names_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"id": "\\ud83d\\ude00"}}\n{{"id": "\\\\ud83d"}}\n{text}\n', encoding="utf-8")
    with pytest.raises(ApiError, match=r"rows\.jsonl:3 holds half a surrogate pair"):
        list(read_lines(path, ApiError))


@pytest.mark.parametrize("content", ['[{"id": 1}, {"id": 2}]', '\ufeff[\n  {"id": 1}\n]\n', "[\n"])
def test_a_json_array_is_explained(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ApiError, match=r"rows\.jsonl:1 begins a JSON array, expected one object a line"):
        list(read_lines(path, ApiError))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"\ufeff{json.dumps({'id': 1})}\n".encode(encoding))
    with pytest.raises(
        ApiError, match=r"rows\.jsonl:1 is not JSON in UTF-8 \(it is UTF-16 or UTF-32; save it as UTF-8"
    ):
        list(read_lines(path, ApiError))


def test_a_line_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_LONGEST", 1 << 20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\n' + b'"' + b"x" * (1 << 20) + b'"\n')
    with pytest.raises(ApiError, match=r"rows\.jsonl:2 is longer than 1 MiB"):
        list(read_lines(path, ApiError))


@given(ROWS, st.integers(0, 200))
def test_an_interrupted_run_is_resumed(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], cut: int) -> None:
    """Wherever the file ends, complete lines stay and the rest is appended anew."""
    path = tmp_path_factory.mktemp("jsonl") / "new" / "rows.jsonl"
    assert append(path, *rows) == []
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    assert append(path, *rows[complete:]) == [row["id"] for row in rows[:complete]]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"notes\n", b'{"a": 1}\n', b"[]\n", b"notes without an end", b'{"id": 1}\nnotes\n']
)
def test_a_file_with_other_lines_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ApiError, match="no row of a test"):
        append(path, {"id": 2})
    assert path.read_bytes() == content
