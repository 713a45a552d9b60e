"""JSON of callers: what is parsed can be used and written again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.errors import ApiError
from edgecompose.server.json_text import check, parse, to_bytes

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_written_is_read_again(value: Any) -> None:
    assert parse(to_bytes(value)) == value
    assert parse(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff", "is not UTF-8: byte 0"),
        (b'"\xed\xa0\x80"', "is not UTF-8"),
        ("{}".encode("utf-16"), "is not UTF-8"),
        (b'"\\ud800"', r"lone surrogate, \\ud800"),
        (b'{"\\udfff": 1}', "lone surrogate"),
        (b'{"a": [{"b": "x\\ud83d"}]}', "lone surrogate"),
        (b"NaN", "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b"[1e999]", "beyond 1.8e308"),
        (b"9" * 5000, "is not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"[" * 65 + b"]" * 65, "nested too deep"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "nested too deep"),
        (b'{"a": 1, "b": 2, "a": 3}', '"a" appears twice'),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_used_is_refused_in_one_line(data: bytes, words: str) -> None:
    with pytest.raises(ApiError, match=words) as raised:
        parse(data)
    message = str(raised.value)
    assert message.isprintable() and len(message) < 400 and message.encode()


def test_a_byte_order_mark_and_whole_surrogate_pairs_are_read() -> None:
    assert parse(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    assert parse(b"[" * 64 + b"]" * 64)


@given(st.text(st.characters(), max_size=5))
def test_a_string_is_refused_exactly_if_it_cannot_be_encoded(text: str) -> None:
    try:
        text.encode()
        sound = True
    except UnicodeEncodeError:
        sound = False
    if sound:
        check([text], "it")
    else:
        with pytest.raises(ApiError):
            check([text], "it")
    assert to_bytes(text)
