"""JSON files, and parsed JSON as frozen dataclasses."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from edgecompose.bundle import records
from edgecompose.bundle.records import read_json, replace_from_json, shown, value_from_json
from edgecompose.errors import ApiError, ExportError, ManifestInvalid


@dataclass(frozen=True)
class Inner:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ManifestInvalid(f"size is {self.size}; expected 0 or more")


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    share: float | None = None
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    table: dict[str, int] = field(default_factory=dict)
    free: Any = None


def test_a_value_has_the_types_of_its_fields() -> None:
    value = {"name": "x", "kind": "b", "share": 1, "many": [{"size": 2}], "table": {"k": 3}, "free": [None]}
    assert value_from_json(Outer, value, "it") == Outer("x", "b", 1.0, Inner(), (Inner(2),), {"k": 3}, [None])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "it is []; expected an object"),
        ({}, "it lacks fields: name"),
        ({"name": "x", "colour": 1}, "it has unknown fields: colour"),
        ({"name": 3}, "it.name is 3; expected a string"),
        ({"name": "x", "kind": "c"}, 'it.kind is "c"; expected one of "a", "b"'),
        ({"name": "x", "share": True}, "it.share is true; expected a number"),
        ({"name": "x", "share": 10**400}, "expected a number below 1.8e308"),
        ({"name": "x", "inner": {"size": True}}, "it.inner.size is true; expected an integer"),
        ({"name": "x", "inner": {"size": -1}}, "it.inner: size is -1"),
        ({"name": "x", "many": [{}, {"size": "1"}]}, 'it.many[1].size is "1"; expected an integer'),
        ({"name": "x", "table": {"k": None}}, "it.table.k is null; expected an integer"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(value: Any, message: str) -> None:
    with pytest.raises(ApiError) as raised:
        value_from_json(Outer, value, "it", ApiError)
    assert message in str(raised.value) and len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("value", "param"),
    [({"name": 3}, "name"), ({"name": "x", "many": [{}, {"size": "1"}]}, "many[1].size"), ({"name": "x", "z": 1}, "z")],
)
def test_an_error_of_a_call_names_its_field(value: Any, param: str) -> None:
    with pytest.raises(ApiError) as raised:
        value_from_json(Outer, value, "it", ApiError)
    assert raised.value.param == param


@pytest.mark.parametrize("value", ["\ud800", float("nan"), {"a": object()}, 10**4000, "x" * 10_000, None])
def test_any_value_is_shown_in_one_short_line_of_ascii(value: object) -> None:
    text = shown(value)
    assert text.isascii() and text.isprintable() and len(text) <= 80


def test_some_fields_are_replaced() -> None:
    assert replace_from_json(Outer("x"), {"kind": "b"}, "it") == Outer("x", "b")
    with pytest.raises(ManifestInvalid, match="it has unknown fields: colour"):
        replace_from_json(Outer("x"), {"colour": 1}, "it")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing; make it"), (b"{", "cannot be read as JSON: .*; make it"), (b"\xff", "cannot be read as JSON")],
)
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=rf"a\.json' {message}"):
        read_json(path, ExportError, "make it")
    with pytest.raises(ExportError, match=f"the list {message}"):
        read_json(path, ExportError, "make it", place="the list")


def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(path, ManifestInvalid, "copy it") == {"a": "é"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be"])
def test_other_encodings_say_what_to_do(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes("\ufeff{}".encode(encoding))
    with pytest.raises(
        ManifestInvalid, match=r"x\.json' cannot be read as JSON: it is UTF-16 or UTF-32; save it as UTF-8"
    ):
        read_json(path, ManifestInvalid, "copy it")


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(ManifestInvalid, match="cannot be read as JSON: .* is no plain file; copy it"):
            read_json(tmp_path / name, ManifestInvalid, "copy it")


def test_a_document_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_LARGEST", 1 << 20)
    (tmp_path / "x.json").write_bytes(b" " * (1 << 20) + b"1")
    with pytest.raises(ManifestInvalid, match="it is larger than 1 MiB"):
        read_json(tmp_path / "x.json", ManifestInvalid, "copy it")
