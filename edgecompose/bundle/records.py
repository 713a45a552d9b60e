"""Parsed JSON as frozen dataclasses, checked field by field; knows nothing of what they mean."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from edgecompose.errors import ManifestInvalid

_T = TypeVar("_T")


def value_from_json(kind: type[_T], found: Any, place: str) -> _T:
    """A frozen dataclass (or a plain value) from parsed JSON, checked field by field."""
    return typing.cast(_T, _convert(kind, found, place))


def _convert(kind: Any, found: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_dataclass(kind, found, place)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [a for a in arguments if a is not type(None)]
        return None if found is None else _convert(inner, found, place)
    if origin is Literal:
        for choice in arguments:
            if found == choice and type(found) is type(choice):
                return choice
        raise ManifestInvalid(f"{place} is {found!r}; one of {', '.join(map(repr, arguments))} is wanted")
    if origin is tuple and isinstance(found, list):
        return tuple(_convert(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(found))
    if origin is dict and isinstance(found, dict):
        return {key: _convert(arguments[1], item, f"{place}.{key}") for key, item in found.items()}
    if kind is Any:
        return found
    if kind is float and isinstance(found, (int, float)) and not isinstance(found, bool):
        try:
            return float(found)
        except OverflowError as error:
            raise ManifestInvalid(f"{place} is an integer beyond float range") from error
    if isinstance(kind, type) and isinstance(found, kind) and not (isinstance(found, bool) and kind is int):
        return found
    wanted = getattr(kind, "__name__", str(kind))
    raise ManifestInvalid(f"{place} is {found!r:.80}; {wanted} is wanted")


def _convert_dataclass(kind: type[Any], found: Any, place: str) -> Any:
    if not isinstance(found, dict):
        raise ManifestInvalid(f"{place} is {found!r:.80}; an object is wanted")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(found) - set(fields))
    if unknown:
        raise ManifestInvalid(f"{place} has unknown fields: {', '.join(unknown)}")
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(found))
    if missing:
        raise ManifestInvalid(f"{place} lacks fields: {', '.join(missing)}")
    values = {name: _convert(hints[name], item, f"{place}.{name}") for name, item in found.items()}
    try:
        return kind(**values)
    except ManifestInvalid as error:
        raise ManifestInvalid(f"{place}: {error}") from error
