"""Messages of chat calls, as clients send them."""

from __future__ import annotations

from typing import Any

import pytest

from edgecompose.errors import ApiError
from edgecompose.generation.messages import Message
from edgecompose.server.conversations import parse_messages

USER = {"role": "user", "content": "hi"}


def system(text: str, role: str = "system") -> dict[str, str]:
    return {"role": role, "content": text}


def test_system_messages_at_the_beginning_are_one_and_later_ones_stay() -> None:
    talk = [system("a"), system("b", "developer"), USER, system("late"), {**USER, "name": "me"}]
    assert parse_messages(talk, 9) == (
        Message("system", "a\n\nb"),
        Message("user", "hi"),
        Message("system", "late"),
        Message("user", "hi"),
    )
    assert parse_messages([system("a"), system("b")], 9) == (Message("system", "a\n\nb"),)


def test_an_empty_answer_of_the_assistant_may_be_null() -> None:
    talk = [USER, {"role": "assistant", "content": None, "tool_calls": None}, USER]
    assert parse_messages(talk, 9)[1] == Message("assistant", "")


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_messages([{"role": "user", "content": parts}], 9) == (Message("user", "ab"),)


@pytest.mark.parametrize(
    ("value", "words", "param"),
    [
        (None, "'messages' is missing; expected a list", "messages"),
        ([], r"'messages' is \[\]", "messages"),
        ("hi", "'messages' is \"hi\"; expected a list of messages such as", "messages"),
        (["hi"], r'messages\[0\] is "hi"; expected an object', "messages[0]"),
        (
            [{"role": "user", "content": None}],
            r"messages\[0\].content is null; expected a string",
            "messages[0].content",
        ),
        ([{"role": "user", "content": 5}], "is 5; expected a string", "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            r"messages\[0\].content\[0\].text is null",
            "messages[0].content[0].text",
        ),
        ([{"role": "user", "content": ["hi"]}], "expected an object", "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "expected text alone", "messages[0].content[0]"),
        ([{"role": "tool", "content": "x"}], "calls a tool", "messages[0]"),
        ([{"role": "assistant", "tool_calls": [{}]}], "calls a tool", "messages[0]"),
        ([{"role": "wizard", "content": "x"}], 'has the role "wizard"', "messages[0].role"),
        ([{"content": "x"}], "has the role null", "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "has the role", "messages[0].role"),
        ([USER, {"role": "assistant", "content": "so"}], "answers are not continued", "messages[1].role"),
        ([USER] * 10, "10 messages; expected 9 at most", "messages"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_place(value: Any, words: str, param: str) -> None:
    with pytest.raises(ApiError, match=words) as raised:
        parse_messages(value, 9)
    assert raised.value.param == param
