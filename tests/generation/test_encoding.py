"""Conversations become tokens that fit: what goes first, what stays, and that it ends when it is cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from edgecompose.cancellation import Cancellation
from edgecompose.errors import Cancelled, GenerationError
from edgecompose.generation.encoding import ConversationEncoder, longest_prompt
from edgecompose.generation.messages import Message
from edgecompose.generation.tokenizer import Tokenizer
from tests.factories import write_tokenizer

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


class CountingTokenizer(Tokenizer):
    """Counts how often a conversation is encoded."""

    count = 0

    def encode_chat(self, messages: Sequence[dict[str, str]], *, special_tokens: bool = True) -> list[int]:
        self.count += 1
        return super().encode_chat(messages, special_tokens=special_tokens)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CountingTokenizer:
    path = write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return CountingTokenizer(path, chat_template=TEMPLATE)


def encoder(
    tokenizer: Tokenizer, *, raw: bool = False, cancellation: Cancellation | None = None
) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, raw=raw, special_tokens=False, cancellation=cancellation or Cancellation())


def turns(count: int) -> list[Message]:
    """A conversation of so many turns of the user, each of which takes three tokens and more."""
    talk = [Message("system", "s")]
    for number in range(count):
        talk += [Message("user", f"q{number}"), Message("assistant", f"a{number}")]
    return talk[:-1]


def test_a_prompt_that_fits_is_whole(tokenizer: CountingTokenizer) -> None:
    encoded = encoder(tokenizer).encode(turns(3), 4096, overflow="truncate")
    assert (tokenizer.decode(encoded.ids), encoded.dropped, encoded.form) == ("sq0a0q1a1q2", 0, "chat")
    raw = encoder(tokenizer, raw=True).encode([Message("user", "hi")], 4096, overflow="refuse")
    assert (raw.ids, raw.form) == (tokenizer.encode_prompt("hi"), "raw")


@pytest.mark.parametrize("most", [9, 12, 16, 30, 60])
def test_the_oldest_turns_go_first(tokenizer: CountingTokenizer, most: int) -> None:
    whole = encoder(tokenizer).encode(turns(20), 9999, overflow="truncate")
    encoded = encoder(tokenizer).encode(turns(20), most, overflow="truncate")
    text = tokenizer.decode(encoded.ids)
    assert text.startswith("sq") and text.endswith("q19")
    assert len(encoded.ids) <= most and encoded.dropped == len(whole.ids) - len(encoded.ids)
    kept = text.count("q")
    longer = [turns(20)[0], *turns(20)[-2 * kept - 1 :]]
    assert len(encoder(tokenizer).encode(longer, 9999, overflow="truncate").ids) > most, "no more turns would fit"


def test_thousands_of_turns_are_shortened_by_bisection(tokenizer: CountingTokenizer) -> None:
    tokenizer.count = 0
    encoded = encoder(tokenizer).encode(turns(5000), 100, overflow="truncate")
    assert len(encoded.ids) <= 100 and tokenizer.decode(encoded.ids).endswith("q4999")
    assert tokenizer.count < 20


def test_the_last_message_loses_its_beginning(tokenizer: CountingTokenizer) -> None:
    talk = [Message("system", "s"), Message("user", "abcdefgh" * 10)]
    encoded = encoder(tokenizer).encode(talk, 20, overflow="truncate")
    assert len(encoded.ids) == 20
    assert tokenizer.decode(encoded.ids).startswith("s") and ("abcdefgh" * 10).endswith(
        tokenizer.decode(encoded.ids)[1:]
    )
    raw = encoder(tokenizer, raw=True).encode(talk[1:], 9, overflow="truncate")
    assert raw.ids[0] == tokenizer.first_tokens[0] and len(raw.ids) == 9
    assert tokenizer.decode(raw.ids) == "abcdefgh"


def test_what_cannot_be_sent_is_refused(tokenizer: CountingTokenizer, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="cannot be sent raw"):
        encoder(tokenizer, raw=True).encode(turns(2), 99, overflow="refuse")
    plain = Tokenizer(write_tokenizer(tmp_path / "tokenizer.json"), chat_template="{# nothing #}")
    with pytest.raises(GenerationError, match="prompt is empty"):
        encoder(plain).encode([Message("user", "hi")], 99, overflow="refuse")


def test_a_cancelled_conversation_is_not_encoded(tokenizer: CountingTokenizer) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        encoder(tokenizer, cancellation=cancellation).encode(turns(3), 9, overflow="truncate")


@pytest.mark.parametrize(("max_tokens", "room"), [(None, 25), (1, 1), (10, 10), (75, 75), (76, 75), (4096, 75)])
def test_an_answer_has_room_after_a_shortened_prompt(max_tokens: int | None, room: int) -> None:
    assert longest_prompt(100, max_tokens) == 100 - room
