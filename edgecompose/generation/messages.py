"""Messages of a conversation: which of them retrieval reads, and which are dropped when the context is full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from edgecompose.errors import GenerationError

Role = Literal["system", "user", "assistant"]
#: Which message of the user's retrieval reads: the last, so that a blend is chosen at each turn, or the first of all.
RouteBy = Literal["last", "first"]
#: A prompt that exceeds the context is an error, or loses its oldest part.
Overflow = Literal["refuse", "truncate"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise GenerationError(f"a message has the role {self.role!r}; use {', '.join(get_args(Role))}")
        if not isinstance(self.content, str):
            raise GenerationError(f"a message's content is {type(self.content).__name__}; expected text")


#: A prompt of its own, or a conversation that ends with the user's turn.
Prompt: TypeAlias = str | Sequence[Message | Mapping[str, str]]


def conversation(prompt: Prompt) -> tuple[Message, ...]:
    """The messages of a prompt; one user's message where it is text.

    Args:
        prompt: text; or messages, also as mappings with `role` and `content`, the last one not the assistant's. The
            chat template may refuse a system message that is not the first.

    Raises:
        GenerationError: there is no message, or one is malformed or misplaced.
    """
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    messages = tuple(m if isinstance(m, Message) else _message(m) for m in prompt)
    if not messages or messages[-1].role == "assistant":
        raise GenerationError("a conversation has to end with a message of the user's")
    return messages


def query_text(messages: Sequence[Message], which: RouteBy) -> str:
    """The message of the user's that retrieval reads; where there is none, that of the system."""
    questions = [message.content for message in messages if message.role == "user"] or [messages[0].content]
    return questions[-1] if which == "last" else questions[0]


def later_turns(messages: Sequence[Message]) -> list[int]:
    """Where each turn but the first begins; a turn is a message of the user and what follows until the next."""
    opening = _opening(messages)
    return [i for i in range(opening + 1, len(messages)) if messages[i].role == "user"]


def without_turns_before(messages: Sequence[Message], start: int) -> tuple[Message, ...]:
    """The conversation from the turn that begins at `start`; system messages at the beginning stay."""
    return (*messages[: _opening(messages)], *messages[start:])


def _opening(messages: Sequence[Message]) -> int:
    """Number of system messages at the beginning."""
    return next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))


def _message(fields: Mapping[str, str]) -> Message:
    if not isinstance(fields, Mapping) or set(fields) != {"role", "content"}:
        raise GenerationError(f"a message is {fields!r:.80}; expected an object with role and content")
    return Message(fields["role"], fields["content"])  # type: ignore[arg-type]  # checked by Message
