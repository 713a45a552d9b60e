"""Messages of a chat call, in the forms that clients send them."""

from __future__ import annotations

import json
from typing import Any, get_args

from edgecompose.bundle.records import shown
from edgecompose.errors import ApiError
from edgecompose.generation.messages import Message, Role

_EXAMPLE = json.dumps([{"role": "user", "content": "hi"}])


def parse_messages(value: object, most: int) -> tuple[Message, ...]:
    """The messages of a call; system messages at the beginning are joined to one, later ones stay where they are.

    Args:
        most: messages of a call.

    Raises:
        ApiError: there is none, they are too many, or one is malformed, calls a tool, or holds what is not text.
    """
    if not isinstance(value, list) or not value:
        missing = "missing" if value is None else shown(value)
        raise ApiError(f"'messages' is {missing}; expected a list of messages such as {_EXAMPLE}", param="messages")
    if len(value) > most:
        raise ApiError(f"{len(value)} messages; expected {most} at most", param="messages")
    messages = [_message(item, f"messages[{index}]") for index, item in enumerate(value)]
    if messages[-1].role == "assistant":
        raise ApiError(
            "the last message is the assistant's; expected the user's, because answers are not continued",
            param=f"messages[{len(messages) - 1}].role",
        )
    opening = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    if opening > 1:
        joined = Message("system", "\n\n".join(message.content for message in messages[:opening]))
        return (joined, *messages[opening:])
    return tuple(messages)


def _message(value: object, place: str) -> Message:
    fields = _object(value, place)
    role = fields.get("role")
    if fields.get("tool_calls") or fields.get("function_call") or role in ("tool", "function"):
        raise ApiError(f"{place} calls a tool, which is not supported; leave it out", param=place)
    role = "system" if role == "developer" else role
    if not isinstance(role, str) or role not in get_args(Role):
        known = ", ".join(get_args(Role))
        raise ApiError(f"{place} has the role {shown(role)}; expected one of {known}", param=f"{place}.role")
    return Message(role, _content(fields.get("content"), place, role))  # type: ignore[arg-type]  # a Role now


def _content(value: object, place: str, role: str) -> str:
    if value is None and role == "assistant":  # as clients send back an answer that was empty
        return ""
    if isinstance(value, list):
        return "".join(_part(part, f"{place}.content[{index}]") for index, part in enumerate(value))
    return _text(value, f"{place}.content", "a string, or a list of text parts")


def _part(value: object, place: str) -> str:
    fields = _object(value, place)
    if fields.get("type") != "text":
        raise ApiError(f"{place} has the type {shown(fields.get('type'))}; expected text alone", param=place)
    return _text(fields.get("text"), f"{place}.text", "a string")


def _text(value: object, place: str, expected: str) -> str:
    if not isinstance(value, str):
        raise ApiError(f"{place} is {shown(value)}; expected {expected}", param=place)
    return value


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ApiError(f"{place} is {shown(value)}; expected an object with role and content", param=place)
    return value
