"""JSON files, and parsed JSON as frozen dataclasses, checked field by field."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgecompose.errors import ApiError, EdgeComposeError, ManifestInvalid
from edgecompose.guard.filesystem import read_plain

_T = TypeVar("_T")
_LARGEST = 256 << 20
#: Byte order marks of UTF-16 and UTF-32.
_OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_Error = type[EdgeComposeError]
_LONGEST_NAME = 120
#: Characters of a value in a message.
_SHOWN = 80
#: What JSON calls the types that fields have.
_WORDS: Mapping[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    tuple: "a list",
}


class _Mismatch(Exception):
    """The value at a place is not what its type says; becomes an error of the caller's kind."""

    def __init__(self, message: str, place: str) -> None:
        super().__init__(message)
        self.place = place

    def as_error(self, kind: _Error, root: str) -> EdgeComposeError:
        """The error to raise; one of a call names its field, without the name of the whole."""
        if issubclass(kind, ApiError):
            whole = root.partition(".")[0]
            return kind(str(self), param=self.place.removeprefix(f"{whole}.") or None)
        return kind(str(self))


def read_json(path: Path, error: _Error, advice: str, *, place: str | None = None) -> Any:
    """The value in a JSON file.

    Args:
        error: the class of error to raise.
        advice: what the caller can do about a file that cannot be used, for messages.
        place: what the file is, for messages; by default its path.

    Raises:
        error: the file is missing, unreadable, larger than 256 MiB, no UTF-8, or no JSON.
    """
    try:
        return json.loads(read_document(path))
    except (FileNotFoundError, NotADirectoryError) as reason:
        raise error(f"{place or repr(str(path))} is missing; {advice}") from reason
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{place or repr(str(path))} cannot be read as JSON: {reason!s:.300}; {advice}") from reason


def read_document(path: Path) -> str:
    """The text of a plain file of at most 256 MiB; a pipe is not waited for.

    Raises:
        OSError: it cannot be opened, is no plain file, or is larger.
        ValueError: it is not UTF-8.
    """
    content = read_plain(path, _LARGEST)
    if len(content) > _LARGEST:
        raise OSError(f"it is larger than {_LARGEST >> 20} MiB")
    return decode_text(content)


def decode_text(content: bytes) -> str:
    """Text of UTF-8 bytes, without the byte order mark that Windows programs put first.

    Raises:
        ValueError: it is no UTF-8, such as the UTF-16 that `>` writes in PowerShell.
    """
    if content.startswith(_OTHER_MARKS):
        raise ValueError("it is UTF-16 or UTF-32; save it as UTF-8")
    return content.decode("utf-8-sig")


def value_from_json(kind: type[_T], value: Any, place: str, error: _Error = ManifestInvalid) -> _T:
    """A frozen dataclass (or a plain value) from parsed JSON, checked field by field.

    Args:
        place: what the value is, for messages.
        error: the class of error to raise.

    Raises:
        error: a field is missing, unknown, of the wrong type or out of range; the message names it.
    """
    try:
        return typing.cast(_T, _convert(kind, value, place))
    except _Mismatch as mismatch:
        raise mismatch.as_error(error, place) from mismatch


def replace_from_json(record: _T, values: Mapping[str, Any], place: str, error: _Error = ManifestInvalid) -> _T:
    """A frozen dataclass with some fields set from parsed JSON, checked as `value_from_json` checks them."""
    hints = _hints(type(record))  # type: ignore[arg-type]
    try:
        _refuse_unknown(values, hints, place)
        changes = {name: _convert(hints[name], value, f"{place}.{name}") for name, value in values.items()}
    except _Mismatch as mismatch:
        raise mismatch.as_error(error, place) from mismatch
    return dataclasses.replace(record, **changes)  # type: ignore[type-var]


def named(name: str) -> str:
    """A name from outside as it may stand in a message: short, printable, in one line."""
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else f"{name!r:.{_LONGEST_NAME}}"


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass; to find them out takes longer than to check a value."""
    return typing.get_type_hints(kind)


def depth_exceeds(value: Any, levels: int) -> bool:
    """Whether objects and arrays of parsed JSON are nested deeper than so many levels."""
    layer = [value]
    for _ in range(levels + 1):
        holders = [item for item in layer if isinstance(item, (dict, list))]
        if not holders:
            return False
        layer = [item for holder in holders for item in (holder.values() if isinstance(holder, dict) else holder)]
    return True


def shown(value: object) -> str:
    """A parsed JSON value as JSON, for messages: ASCII, of 80 characters at most."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # no JSON, or nested too deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _convert(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_dataclass(kind, value, place)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [a for a in arguments if a is not type(None)]
        return None if value is None else _convert(inner, value, place)
    if origin is Literal:
        for choice in arguments:
            if value == choice and type(value) is type(choice):
                return choice
        raise _Mismatch(f"{place} is {shown(value)}; expected one of {', '.join(map(shown, arguments))}", place)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{place}.{named(key)}") for key, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise _Mismatch(f"{place} is {shown(value)}; expected a number below 1.8e308", place) from error
    if isinstance(kind, type) and isinstance(value, kind) and not (isinstance(value, bool) and kind is int):
        return value
    raise _Mismatch(f"{place} is {shown(value)}; expected {_WORDS.get(origin or kind, str(kind))}", place)


def _convert_dataclass(kind: type[Any], value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise _Mismatch(f"{place} is {shown(value)}; expected an object", place)
    hints = _hints(kind)  # type: ignore[arg-type]
    _refuse_unknown(value, hints, place)
    required = {
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(value))
    if missing:
        raise _Mismatch(f"{place} lacks fields: {', '.join(missing)}", place)
    values = {name: _convert(hints[name], item, f"{place}.{name}") for name, item in value.items()}
    try:
        return kind(**values)
    except EdgeComposeError as error:
        raise _Mismatch(f"{place}: {error}", place) from error


def _refuse_unknown(value: Mapping[str, Any], fields: Mapping[str, Any], place: str) -> None:
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise _Mismatch(f"{place} has unknown fields: {', '.join(map(named, unknown))}", f"{place}.{unknown[0]}")
