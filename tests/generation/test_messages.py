"""Conversations: what they may be, what retrieval reads of them, what goes first."""

from __future__ import annotations

from typing import Any

import pytest

from edgecompose.errors import GenerationError
from edgecompose.generation.messages import Message, conversation, later_turns, query_text, without_turns_before

TALK = [
    ("system", "be brief"),
    ("user", "one"),
    ("assistant", "1"),
    ("user", "two"),
    ("assistant", "2"),
    ("user", "3?"),
]
MESSAGES = tuple(Message(role, content) for role, content in TALK)  # type: ignore[arg-type]


def test_text_is_one_message_of_the_user() -> None:
    assert conversation("hello") == (Message("user", "hello"),)
    assert conversation([{"role": role, "content": content} for role, content in TALK]) == MESSAGES
    assert conversation(MESSAGES) == MESSAGES


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "has to end with a message of the user's"),
        ([Message("user", "a"), Message("assistant", "b")], "has to end with a message of the user's"),
        ([{"role": "robot", "content": "a"}], "role 'robot'; use system, user, assistant"),
        ([{"role": "user"}], "expected an object with role and content"),
        ([{"role": "user", "content": ["a"]}], "content is list; expected text"),
        ([["user", "a"]], "expected an object with role and content"),
    ],
)
def test_what_is_no_conversation_is_refused(prompt: Any, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        conversation(prompt)


def test_retrieval_reads_a_message_of_the_user() -> None:
    assert query_text(MESSAGES, "last") == "3?"
    assert query_text(MESSAGES, "first") == "one"


def test_a_system_message_may_come_late_or_alone() -> None:
    late = (Message("user", "a"), Message("system", "b"))
    assert conversation(late) == late and query_text(late, "last") == "a"
    alone = (Message("system", "write a poem"),)
    assert conversation(alone) == alone and query_text(alone, "last") == query_text(alone, "first") == "write a poem"


def test_the_oldest_turn_goes_first_and_the_system_message_stays() -> None:
    assert later_turns(MESSAGES) == [3, 5]
    assert without_turns_before(MESSAGES, 3) == (MESSAGES[0], *MESSAGES[3:])
    assert without_turns_before(MESSAGES, 5) == (MESSAGES[0], MESSAGES[5])
    assert later_turns((MESSAGES[0], MESSAGES[5])) == later_turns(MESSAGES[5:]) == []
