"""Messages of JSON-RPC 2.0: requests, notifications and batches, read from bounded lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from edgecompose.bundle.records import shown
from edgecompose.errors import ApiError, EdgeComposeError
from edgecompose.server import json_text

PARSE, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603
#: Of ours, and, as editors have it, of a call that was cancelled.
REFUSED, CANCELLED = -32000, -32800
_CHUNK = 64 << 10


@dataclass(frozen=True, slots=True)
class Call:
    """A request, or a notification, which has no id and gets no answer."""

    method: str
    params: dict[str, Any]
    name: str | int | float | None = None
    is_notification: bool = False


class RpcError(EdgeComposeError):
    """A message cannot be answered; `name` is its id, None where it has none that can be read."""

    def __init__(self, message: str, code: int, name: Any = None) -> None:
        super().__init__(message)
        self.code, self.name = code, name


@dataclass(frozen=True, slots=True)
class TooLong:
    """Stands for a line that was longer than it may be."""

    limit: int


def bounded_lines(read: Callable[[int], bytes], limit: int) -> Iterator[bytes | TooLong]:
    """Lines of an input; of one that is too long nothing is kept, and the next line is read as usual.

    Args:
        read: gives at most so many bytes as soon as there are some, and none at the end.
        limit: bytes of a line.
    """
    kept, dropping = bytearray(), False
    while data := read(_CHUNK):
        for index, piece in enumerate(data.split(b"\n")):
            if index:
                yield TooLong(limit) if dropping else bytes(kept)
                kept.clear()
                dropping = False
            dropping = dropping or len(kept) + len(piece) > limit
            if dropping:
                kept.clear()
            else:
                kept += piece
    if kept or dropping:
        yield TooLong(limit) if dropping else bytes(kept)


def parse_line(line: bytes | TooLong) -> Any:
    """The value of a line: an object, or a list of them.

    Raises:
        RpcError: it is no JSON, or too long.
    """
    if isinstance(line, TooLong):
        raise RpcError(f"the line is longer than {line.limit} bytes; send less", INVALID_REQUEST)
    try:
        return json_text.parse(line, "the line")
    except ApiError as error:
        raise RpcError(str(error), PARSE) from error


def parse_message(message: object) -> Call:
    """One call.

    Raises:
        RpcError: it is none.
    """
    if not isinstance(message, dict):
        raise RpcError(
            f"the message is {shown(message)}; expected an object with jsonrpc, id, method and params", INVALID_REQUEST
        )
    name, method, params = message.get("id"), message.get("method"), message.get("params")
    if isinstance(name, (dict, list, bool)):
        raise RpcError(f"id is {shown(name)}; expected a string or a number", INVALID_REQUEST)
    if not isinstance(method, str):
        raise RpcError(f"method is {shown(method)}; expected a string", INVALID_REQUEST, name)
    if params is not None and not isinstance(params, dict):
        raise RpcError(f"params is {shown(params)}; expected an object", INVALID_PARAMS, name)
    return Call(method, params or {}, name, "id" not in message)
