"""Conversations: what is remembered, and what an interruption leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgecompose import Chat, Composer, Request, open_bundle
from edgecompose.cancellation import Cancellation
from edgecompose.errors import Cancelled, GenerationError
from tests.recipes import PROMPT


@pytest.fixture(scope="module")
def composer(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as opened:
        yield opened


def test_an_answer_is_part_of_the_conversation(composer: Composer) -> None:
    chat = Chat(composer, Request(max_tokens=4), system="be brief")
    chunks: list[str] = []
    answer = chat.say(PROMPT, on_text=chunks.append)
    assert "".join(chunks) == answer.text
    roles = [message.role for message in chat.messages]
    assert roles == (["system", "user", "assistant"] if answer.text else ["system", "user"])
    assert chat.messages[0].content == "be brief"
    longer = chat.say("and then?")
    assert longer.prompt_tokens > answer.prompt_tokens
    chat.reset()
    assert [message.role for message in chat.messages] == ["system"]
    assert chat.say(PROMPT).text == answer.text


def test_an_interruption_keeps_what_was_written(composer: Composer) -> None:
    chat = Chat(composer, Request(max_tokens=8))
    seen: list[str] = []

    def stop(chunk: str) -> None:
        seen.append(chunk)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say(PROMPT, on_text=stop)
    assert [(m.role, m.content) for m in chat.messages] == [("user", PROMPT), ("assistant", seen[0])]


def test_a_cancellation_keeps_what_was_written(composer: Composer) -> None:
    chat, cancellation = Chat(composer, Request(max_tokens=8)), Cancellation()
    seen: list[str] = []

    def cancel(chunk: str) -> None:
        seen.append(chunk)
        cancellation.cancel()

    with pytest.raises(Cancelled):
        chat.say(PROMPT, on_text=cancel, cancellation=cancellation)
    assert [(m.role, m.content) for m in chat.messages] == [("user", PROMPT), ("assistant", "".join(seen))]
    with pytest.raises(Cancelled):
        chat.say("again", cancellation=cancellation)
    with pytest.raises(GenerationError):
        Chat(composer, Request(max_tokens=8)).say("x " * 2000)
    chat.say("and then?")
    assert [m.role for m in chat.messages] == ["user", "assistant"] * 2


def test_a_stage_that_fails_leaves_the_conversation(composer: Composer) -> None:
    chat = Chat(composer, Request(weights={"absent": 1.0}))
    with pytest.raises(Exception, match="absent"):
        chat.say(PROMPT)
    assert chat.messages == ()
