"""Finds the files that an ONNX graph reads beside itself, before ONNX Runtime opens it.

A tensor of a graph may lie in any file that the graph names. A bundle's graphs may name those that the manifest names,
so that every byte that is read was hashed.

The graph is a protobuf message. Only what can hold a tensor is walked: model, graphs, nodes, attributes, functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgecompose.bundle.files import Bundle
from edgecompose.errors import BundleError

#: Key of the entry of a tensor that says where its values lie. A message without these bytes names no file.
_KEY = b"location"
#: Message -> number of a field -> the message that the field holds. Names and numbers are those of onnx.proto.
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
#: Deeper messages are refused by protobuf itself.
_DEEPEST = 100
_LONG = 128
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NUMBER = re.compile(rb"[0-9]{1,18}")
_ORT_FORMAT = b"ORTM"


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where a tensor's values lie: `end` is the first byte behind them, as far as the graph says so."""

    location: str
    end: int


class _Malformed(Exception):
    """The bytes are no message of protobuf."""


def graph_path(bundle: Bundle, relative: str) -> Path:
    """Path of a graph of a bundle whose hash has been checked, and the hash of every file that it reads as well.

    Raises:
        FileDamaged: the bytes are not those that the manifest was written for.
        BundleError: it is no ONNX graph, or reads a file that the manifest does not name, or beyond a file's end.
    """
    path = bundle.path(relative)
    ends: dict[str, int] = {}
    for data in external_data(path.read_bytes(), relative):
        ends[data.location] = max(data.end, ends.get(data.location, 0))
    for location, end in ends.items():
        beside = str(PurePosixPath(relative).parent / location)
        entry = bundle.manifest.files.get(beside)
        if entry is None or PurePosixPath(location).name != location:
            raise BundleError(
                f"graph '{relative}' reads the file {location!r:.80}, which the manifest does not name; "
                "export the bundle again"
            )
        if end > entry.bytes:
            raise BundleError(
                f"graph '{relative}' reads {end} bytes of '{beside}', which has {entry.bytes}; export the bundle again"
            )
        bundle.path(beside)
    return path


def external_data(content: bytes, name: str) -> list[ExternalData]:
    """What the tensors of a graph read from files, wherever they are: initializers, attributes, subgraphs, functions.

    Args:
        content: the bytes of an .onnx file.
        name: what it is, for messages.

    Raises:
        BundleError: the bytes are no ONNX graph.
    """
    try:
        if content[4:8] == _ORT_FORMAT or name.endswith(".ort"):
            raise _Malformed("it is in ONNX Runtime's own format")
        return list(_walk(content))
    except _Malformed as error:
        raise BundleError(f"graph '{name}' is no ONNX graph: {error}; export the bundle again") from error


def _walk(content: bytes) -> Iterator[ExternalData]:
    messages = [("model", 0, len(content), 0)]
    while messages:
        kind, start, end, depth = messages.pop()
        if depth > _DEEPEST:
            raise _Malformed(f"it is nested deeper than {_DEEPEST} messages")
        children, entries = _FIELDS[kind], []
        for number, first, last in _spans(content, start, end):
            child = children.get(number)
            if child == "entry":
                entries.append(_entry(content, first, last))
            elif child is not None and content.find(_KEY, first, last) >= 0:
                messages.append((child, first, last, depth + 1))
        if entries:
            yield from _placed(entries)


def _placed(entries: list[tuple[list[bytes], list[bytes]]]) -> Iterator[ExternalData]:
    """The places that the entries of one tensor name. A field that is there twice counts each time."""
    values = {
        key: [v for keys, vs in entries if key in keys for v in vs or [b""]] for key in (_KEY, b"offset", b"length")
    }
    for value in (*values[b"offset"], *values[b"length"]):
        if not _NUMBER.fullmatch(value):
            raise _Malformed(f"the place of a tensor is {value!r:.40}")
    end = sum(max(map(int, values[key]), default=0) for key in (b"offset", b"length"))
    for location in values[_KEY]:
        yield ExternalData(location.decode("utf-8", "replace"), end)


def _entry(content: bytes, start: int, end: int) -> tuple[list[bytes], list[bytes]]:
    """Keys and values of an entry; a sound one has one of each."""
    keys: list[bytes] = []
    values: list[bytes] = []
    for number, first, last in _spans(content, start, end):
        if number in (1, 2):
            (keys if number == 1 else values).append(content[first:last])
    return keys, values


def _spans(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of every field of a message that holds bytes; other fields are passed over."""
    place = start
    while place < end:
        tag = content[place]
        place += 1
        if tag > 127:
            tag, place = _varint(content, place - 1, end, 5)
        kind = tag & 7
        if kind == _BYTES:
            size = content[place] if place < end else _LONG
            place += 1
            if size > 127:
                size, place = _varint(content, place - 1, end, 10)
            first, place = place, place + size
            if place > end:
                raise _Malformed(f"a field of {size} bytes leaves its message")
            yield tag >> 3, first, place
        elif kind == _VARINT:
            _, place = _varint(content, place, end, 10)
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
        else:
            raise _Malformed(f"a field is of the kind {kind}")
    if place != end:
        raise _Malformed("a field leaves its message")


def _varint(content: bytes, place: int, end: int, longest: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for count, byte in enumerate(content[place : min(end, place + longest)]):
        value |= (byte & 127) << 7 * count
        if byte < 128:
            return value, place + count + 1
    raise _Malformed("a number does not end")
