"""A conversation to token ids that fit the context, the oldest part left out where a caller allows it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from edgecompose.bundle.specs import PromptForm
from edgecompose.cancellation import Cancellation
from edgecompose.errors import GenerationError
from edgecompose.generation.messages import Message, Overflow, later_turns, without_turns_before
from edgecompose.generation.tokenizer import Tokenizer

#: Into how many parts the context is divided, of which a shortened prompt has one at least and leaves one at least.
_PARTS = 4


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a prompt, how many were left out of it, and whether it stands in the chat template."""

    ids: list[int]
    dropped: int
    form: PromptForm


@dataclass(frozen=True, slots=True)
class ConversationEncoder:
    """Encodes conversations that end where the answer begins.

    Attributes:
        raw: send one message as it is, without the chat template.
        special_tokens: read special tokens that are written in a message as such; otherwise they are text.
        cancellation: looked at between the attempts to shorten a conversation.
    """

    tokenizer: Tokenizer
    raw: bool
    special_tokens: bool
    cancellation: Cancellation

    def encode(self, messages: Sequence[Message], most: int, *, overflow: Overflow) -> Encoded:
        """Token ids of a conversation.

        Args:
            most: how many tokens are kept with `overflow` 'truncate', which leaves out what does not fit: the oldest
                turns, then the beginning of the last one.

        Raises:
            GenerationError: nothing to send, or a conversation that would be sent raw.
            Cancelled: another thread ended it.
        """
        if self.raw and len(messages) > 1:
            raise GenerationError(
                "a conversation of several messages cannot be sent raw; leave --raw out, or send one prompt"
            )
        if overflow == "truncate":
            messages = self._shortened(messages)
        ids = whole = self._ids(messages)
        if overflow == "truncate" and len(ids) > most:
            ids = self._truncated(messages, ids, most)
        if not ids:
            raise GenerationError("the prompt is empty; give some text")
        return Encoded(ids, len(whole) - len(ids), "raw" if self.raw else "chat")

    def _shortened(self, messages: Sequence[Message]) -> Sequence[Message]:
        """A conversation without what certainly exceeds the context, before any of it is tokenised."""
        characters = sum(len(message.content) for message in messages)
        most = self.tokenizer.most_characters if self.tokenizer.cannot_fit(characters) else None
        if most is None:
            return messages
        begin = 0
        for start in later_turns(messages):
            if characters <= most:
                break
            characters -= sum(len(message.content) for message in messages[begin:start])
            begin = start
        if begin:
            messages = without_turns_before(messages, begin)
        last = messages[-1]
        return (*messages[:-1], Message(last.role, last.content[-most:]))

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        self.cancellation.check()
        if self.raw:
            return self.tokenizer.encode_prompt(messages[-1].content, special_tokens=self.special_tokens)
        return self.tokenizer.encode_chat(
            [{"role": m.role, "content": m.content} for m in messages], special_tokens=self.special_tokens
        )

    def _truncated(self, messages: Sequence[Message], ids: list[int], most: int) -> list[int]:
        """Ids of a conversation without the fewest oldest turns that leave at most `most`; more if none fits."""
        starts = later_turns(messages)
        if starts:
            fits = bisect.bisect_left(
                starts, True, key=lambda start: len(self._ids(without_turns_before(messages, start))) <= most
            )
            messages = without_turns_before(messages, starts[min(fits, len(starts) - 1)])
            ids = self._ids(messages)
        while len(ids) > most:
            cut = self._cut(messages, len(ids) - most)
            if cut is None:
                break
            messages, ids = cut, self._ids(cut)
        return ids

    def _cut(self, messages: Sequence[Message], excess: int) -> tuple[Message, ...] | None:
        """The last message without its first tokens, as many as are too many; None where that is all of it."""
        last = self.tokenizer.encode(messages[-1].content, special_tokens=self.special_tokens)
        if excess >= len(last):
            return None
        return (*messages[:-1], Message("user", self.tokenizer.decode(last[excess:])))


def longest_prompt(context: int, max_tokens: int | None) -> int:
    """How many tokens a shortened prompt may have, so that the answer has room.

    An answer of at most `max_tokens` gets all of them up to three quarters of the context; one without a limit gets
    a quarter.
    """
    room = context // _PARTS if max_tokens is None else min(max_tokens, context - context // _PARTS)
    return context - max(1, room)
