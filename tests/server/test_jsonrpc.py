"""Lines and messages of JSON-RPC 2.0."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.server.jsonrpc import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    PARSE,
    Call,
    RpcError,
    TooLong,
    bounded_lines,
    parse_line,
    parse_message,
)


@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.integers(0, 99))
def test_lines_are_those_of_the_input_however_it_comes(lines: list[bytes], seed: int) -> None:
    draw, stream = random.Random(seed), io.BytesIO(b"\n".join(lines))
    result = list(bounded_lines(lambda size: stream.read(draw.randint(1, 7)), 12))
    expected = [line if len(line) <= 12 else TooLong(12) for line in lines]
    while expected and expected[-1] == b"":
        expected.pop()
    while result and result[-1] == b"":
        result.pop()
    assert result == expected


def test_a_line_without_end_is_not_kept() -> None:
    parts = iter([b"x" * 1000] * 1000 + [b"\nok\n", b""])
    assert list(bounded_lines(lambda size: next(parts), 100)) == [TooLong(100), b"ok"]


def test_calls_and_notifications() -> None:
    assert parse_message({"id": "a", "method": "chat", "params": {"x": 1}}) == Call("chat", {"x": 1}, "a")
    assert parse_message({"method": "$/setTrace"}) == Call("$/setTrace", {}, None, is_notification=True)
    assert parse_message({"id": None, "method": "chat"}) == Call("chat", {}, None)


@pytest.mark.parametrize(
    ("message", "code", "name"),
    [
        (5, INVALID_REQUEST, None),
        ({"id": 1}, INVALID_REQUEST, 1),
        ({"id": 7, "method": "chat", "params": [1]}, INVALID_PARAMS, 7),
        ({"id": "x", "method": 5}, INVALID_REQUEST, "x"),
        ({"id": [1], "method": "chat"}, INVALID_REQUEST, None),
        ({"id": True, "method": "chat"}, INVALID_REQUEST, None),
    ],
)
def test_a_broken_call_keeps_its_id(message: object, code: int, name: object) -> None:
    with pytest.raises(RpcError) as raised:
        parse_message(message)
    assert (raised.value.code, raised.value.name) == (code, name)


def test_a_line_that_is_no_json() -> None:
    for line, code in ((b"{", PARSE), (b"\xff", PARSE), (b'"\\ud800"', PARSE), (TooLong(9), INVALID_REQUEST)):
        with pytest.raises(RpcError) as raised:
            parse_line(line)
        assert raised.value.code == code
