"""Reads the tensors of a safetensors file out of its bytes.

The header is compared with the bytes before an array is made: sizes, types, and that the tensors lie one after
another and fill the file. Arrays are views of the bytes, so that nothing is copied and a header cannot ask for memory.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.errors import EdgeComposeError

Tensors = dict[str, npt.NDArray[Any]]
#: Types that numpy has, as safetensors calls them.
_DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}
_MOST_HEADER, _MOST_AXES, _MOST_VALUES = 16 << 20, 8, 1 << 48


class _Malformed(Exception):
    """The header is not that of a safetensors file, or not of these bytes."""


def tensors_of(content: bytes, what: str, error: type[EdgeComposeError]) -> tuple[Tensors, dict[str, str]]:
    """Tensors by name, as views of the bytes, and the metadata of a safetensors file.

    Args:
        content: the whole file.
        what: what it is, for messages.
        error: the class of error to raise.

    Raises:
        error: it is no safetensors file, or its header does not fit its bytes.
    """
    try:
        header, start = _header(content[:8], content)
        metadata = _metadata(header)
        tensors: Tensors = {}
        for name, dtype, shape, first in _places(header, len(content) - start):
            values = np.frombuffer(content, dtype, math.prod(shape), start + first).reshape(shape)
            tensors[name] = values if values.flags.aligned else values.copy()
        return tensors, metadata
    except _Malformed as reason:
        raise error(f"{what} cannot be read: {reason}; export it again") from reason


def metadata_of(path: Path, what: str, error: type[EdgeComposeError]) -> dict[str, str]:
    """The metadata of a safetensors file, whose tensors are not read.

    Raises:
        error: it cannot be read, or is no safetensors file.
    """
    try:
        with path.open("rb") as stream:
            size = stream.read(8)
            header, start = _header(size, size + stream.read(min(int.from_bytes(size, "little"), _MOST_HEADER)))
            metadata = _metadata(header)
            _places(header, path.stat().st_size - start)
        return metadata
    except (OSError, _Malformed) as reason:
        raise error(f"{what} cannot be read: {reason!s:.300}; export it again") from reason


def _header(size: bytes, content: bytes) -> tuple[dict[str, Any], int]:
    """The header as parsed JSON, and where the tensors begin."""
    end = 8 + int.from_bytes(size, "little")
    if len(size) < 8 or end > min(len(content), 8 + _MOST_HEADER):
        raise _Malformed(f"its header of {end - 8} bytes is longer than the file or {_MOST_HEADER >> 20} MiB")
    try:
        header = json.loads(content[8:end].decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as reason:
        raise _Malformed(f"its header is not JSON ({reason!s:.120})") from reason
    if not isinstance(header, dict):
        raise _Malformed("its header is no object")
    return header, end


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name is there twice")
    return fields


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    """Takes the metadata out of a header."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Malformed("its metadata are not texts")
    return metadata


def _places(header: dict[str, Any], size: int) -> list[tuple[str, np.dtype[Any], tuple[int, ...], int]]:
    """Name, type, shape and first byte of every tensor; together they fill `size` bytes."""
    places, end = [], 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        dtype, shape, first, last = _layout(name, entry)
        count = math.prod(shape)
        if first != end or last - first != count * dtype.itemsize or last > size:
            raise _Malformed(
                f"tensor {name!r:.80} lies at {first} to {last} of {size} bytes, expected {count} values from {end}"
            )
        places.append((name, dtype, shape, first))
        end = last
    if end != size:
        raise _Malformed(f"{size - end} bytes belong to no tensor")
    return places


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)):
        raise _Malformed(f"tensor {name!r:.80} has no place in the file")
    return offsets[0], offsets[1]


def _layout(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Type, shape, begin and end of a tensor."""
    first, last = _offsets(name, entry)
    kind, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise _Malformed(f"tensor {name!r:.80} is of type {kind!r:.20}, which numpy lacks")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise _Malformed(f"tensor {name!r:.80} has the shape {shape!r:.60}")
    if math.prod(max(1, n) for n in shape) > _MOST_VALUES:
        raise _Malformed(f"tensor {name!r:.80} has the shape {shape!r:.60}, which is too large")
    return np.dtype(_DTYPES[kind]).newbyteorder("<"), tuple(shape), first, last
