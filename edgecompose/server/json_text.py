"""JSON as callers send it: parsed strictly, so that whatever follows may rely on it, and written so that it encodes."""

from __future__ import annotations

import json
import math
from typing import Any

from edgecompose.errors import ApiError

#: Levels of lists and objects in a call; no field needs more than a few.
_DEEPEST = 64


def parse(data: bytes, what: str = "the request") -> Any:
    """The value in UTF-8 JSON: no lone surrogate, no name twice in an object, every number finite, 64 levels at most.

    Args:
        what: what the text is, for messages.

    Raises:
        ApiError: it is not so.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ApiError(f"{what} is not UTF-8: byte {error.start} cannot be read; send UTF-8") from error
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ApiError(f"{what} is nested too deep; expected {_DEEPEST} levels at most") from error
    except ValueError as error:  # an integer of thousands of digits too
        raise ApiError(f"{what} is not JSON: {error!s:.200}") from error
    check(value, what)
    return value


def check(value: object, what: str) -> None:
    """Refuse a parsed value that cannot be used or written again.

    Raises:
        ApiError: a lone surrogate, a number that is not finite, or too many levels.
    """
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            else:
                _check_scalar(item, what)
        level = below
        if not level:
            return
    raise ApiError(f"{what} is nested too deep; expected {_DEEPEST} levels at most")


def to_bytes(value: object) -> bytes:
    """A value as compact UTF-8 JSON; what is no Unicode becomes '?'."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def _check_scalar(value: object, what: str) -> None:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ApiError(
                f"{what} holds a lone surrogate, \\u{ord(value[error.start]):04x}, which is no Unicode; "
                "send both halves of the character"
            ) from error
    elif isinstance(value, float) and not math.isfinite(value):
        raise ApiError(f"{what} holds a number beyond 1.8e308; send a smaller one")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise ValueError(f"the name {json.dumps(twice):.80} appears twice in an object")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
