"""Checks that an index file is one that USearch can walk: USearch itself follows every number in it unchecked.

The file of USearch 2, little-endian and packed:

* rows and columns (u32): vectors and bytes of a vector; then the vectors.
* a head of 64 bytes: "usearch", the version (3 u16), kinds of metric, values, keys and slots (4 bytes), vectors present
  and deleted, dimensions (3 u64), whether a key may have several vectors (1 byte).
* the graph's size, connectivity, connectivity of the lowest level, highest level, and the slot where a search begins
  (5 u64); the level of each node (i16).
* the nodes: key (u64), level (i16), and for each level from 0 on a count (u32) and slots of neighbours (u32), as many
  as the connectivity of the level.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import IndexSpec
from edgecompose.errors import RetrievalError

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
_MATRIX, _HEAD, _GRAPH = struct.Struct("<II"), struct.Struct("<7s3H4BQQQB"), struct.Struct("<5Q")
_HEAD_BYTES, _MAGIC, _MAJOR = 64, b"usearch", 2
_COSINE, _KEY_KIND, _SLOT_KIND = ord("c"), 14, 15
#: Type of values -> what USearch calls it, integers of its size, and its infinity as such an integer.
_SCALARS: dict[str, tuple[int, type[np.unsignedinteger[Any]], type[np.signedinteger[Any]], int]] = {
    "f32": (11, np.uint32, np.int32, 0x7F800000),
    "f16": (12, np.uint16, np.int16, 0x7C00),
}
_MOST_CONNECTIVITY, _MOST_LEVELS = 1024, 64
#: Keys beyond belong to no task.
_MOST_KEY = 1 << 53
#: Nodes that are looked at in one pass.
_NODES = 4096


class _Malformed(Exception):
    """The file is not what it should be; becomes a RetrievalError."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """The graph of an index: `data` are the nodes' bytes, `levels` (n,) and `starts` (n,) their levels and places."""

    data: Bytes
    levels: npt.NDArray[np.int16]
    starts: Integers
    connectivity: int
    base_connectivity: int

    @property
    def base_bytes(self) -> int:
        """Bytes of a node up to its neighbours of the lowest level."""
        return 14 + 4 * self.base_connectivity

    @property
    def level_bytes(self) -> int:
        """Bytes of a node's neighbours of a higher level."""
        return 4 + 4 * self.connectivity


def check_index_file(source: Path | bytes, spec: IndexSpec, *, unique: bool = False) -> None:
    """Make sure that USearch reads only what is there, whatever it does with the index.

    Args:
        source: the file, or its bytes.
        unique: keys must differ, as an index must have it to which vectors are added.

    Raises:
        RetrievalError: unreadable, of another size, dimension, type or version than `spec` and this program expect, or
            with a graph that leads out of it.
    """
    place = source.name if isinstance(source, Path) else spec.file
    try:
        content = np.memmap(source, np.uint8, "r") if isinstance(source, Path) else np.frombuffer(source, np.uint8)
        _check(content, spec, unique=unique)
    except (OSError, ValueError, _Malformed) as reason:  # ValueError: an empty file
        raise RetrievalError(f"index '{place}' cannot be read: {reason}; export the bundle again") from reason


def _check(content: Bytes, spec: IndexSpec, *, unique: bool) -> None:
    kind, value, signed, infinity = _SCALARS[spec.dtype]
    rows, columns = _MATRIX.unpack(_part(content, 0, _MATRIX.size))
    width = spec.dimension * np.dtype(value).itemsize
    if (rows, columns) != (spec.vectors, width):
        raise _Malformed(f"it has {rows} vectors of {columns} bytes, expected {spec.vectors} of {width}")
    end = _MATRIX.size + rows * columns
    _check_head(_part(content, end, _HEAD_BYTES), spec, kind)
    end += _HEAD_BYTES
    graph = _graph(content, end, spec.vectors)
    _check_vectors(content[_MATRIX.size : _MATRIX.size + rows * columns].view(value), signed, infinity)
    if graph is not None:
        keys = _check_nodes(graph)
        _check_upper_levels(graph)
        rising = bool((keys[1:] > keys[:-1]).all())  # as they were added, unless tasks were removed
        if unique and not rising and len(np.unique(keys)) != len(keys):
            raise _Malformed("two vectors have one key")


def _part(content: Bytes, start: int, size: int) -> bytes:
    part = content[start : start + size]
    if len(part) != size:
        raise _Malformed(f"it has {len(content)} bytes and ends before its graph")
    return part.tobytes()


def _check_head(head: bytes, spec: IndexSpec, kind: int) -> None:
    magic, major, minor, _, metric, scalar, key, slot, present, deleted, dimensions, multi = _HEAD.unpack_from(head)
    if magic != _MAGIC or major != _MAJOR:
        version = f"version {major}.{minor} of its format" if magic == _MAGIC else "no index of USearch"
        raise _Malformed(f"it is {version}, expected version {_MAJOR}")
    if (metric, scalar, key, slot, multi) != (_COSINE, kind, _KEY_KIND, _SLOT_KIND, 0):
        raise _Malformed(f"its kinds are {metric}, {scalar}, {key}, {slot}, {multi}; expected cosine in {spec.dtype}")
    if (present, deleted, dimensions) != (spec.vectors, 0, spec.dimension):
        raise _Malformed(
            f"its head says {present} vectors of {dimensions} dimensions and {deleted} deleted ones, "
            f"expected {spec.vectors} of {spec.dimension}"
        )


def _graph(content: Bytes, start: int, size: int) -> _Graph | None:
    """The graph that begins at a byte of the file; None where it has no node."""
    count, connectivity, base, highest, entry = _GRAPH.unpack(_part(content, start, _GRAPH.size))
    start += _GRAPH.size
    if count != size:
        raise _Malformed(f"its graph has {count} nodes, expected {size}")
    if not (2 <= connectivity <= _MOST_CONNECTIVITY and 2 <= base <= _MOST_CONNECTIVITY):
        raise _Malformed(f"its graph has the connectivity {connectivity}, {base}; expected 2 to {_MOST_CONNECTIVITY}")
    if not size:
        if start != len(content):
            raise _Malformed(f"{len(content) - start} bytes follow an empty graph")
        return None
    levels = np.frombuffer(_part(content, start, 2 * size), "<i2")
    start += 2 * size
    if levels.min() < 0 or levels.max() != highest or highest >= _MOST_LEVELS:
        raise _Malformed(f"levels of its nodes are {levels.min()} to {levels.max()}, expected 0 to {highest}")
    if not (entry < size and levels[entry] == highest):
        raise _Malformed(f"a search begins at node {entry} of {size}, expected one of level {highest}")
    graph = _Graph(content[start:], levels, np.zeros(0, np.int64), connectivity, base)
    sizes = graph.base_bytes + levels.astype(np.int64) * graph.level_bytes
    starts = np.cumsum(sizes) - sizes
    if starts[-1] + sizes[-1] != len(graph.data):
        raise _Malformed(f"its nodes have {len(graph.data)} bytes, expected {starts[-1] + sizes[-1]}")
    return _Graph(graph.data, levels, starts, connectivity, base)


def _check_vectors(values: npt.NDArray[Any], signed: type[np.signedinteger[Any]], infinity: int) -> None:
    """No order can be found among numbers that are not finite; as integers they are those from infinity on."""
    if not len(values):
        return
    sign = 1 << (8 * values.itemsize - 1)
    if values.view(signed).max() >= infinity or values.max() >= sign + infinity:
        raise _Malformed("a vector holds numbers that are not finite")


def _check_nodes(graph: _Graph) -> npt.NDArray[np.uint64]:
    """Keys, levels and neighbours of the lowest level of all nodes. Places of lists that are not used count as well."""
    fields = [("key", "<u8"), ("level", "<i2"), ("count", "<u4"), ("slots", "<u4", (graph.base_connectivity,))]
    keys = np.empty(len(graph.levels), np.uint64)
    for chunk, nodes in _records(graph, graph.starts, np.dtype(fields)):
        keys[chunk] = nodes["key"]
        if not np.array_equal(nodes["level"], graph.levels[chunk]):
            raise _Malformed("a node has another level than its graph says")
        if nodes["count"].max() > graph.base_connectivity or nodes["slots"].max() >= len(graph.levels):
            raise _Malformed("a node has neighbours that there are not")
    if keys.max() >= _MOST_KEY:
        raise _Malformed(f"a vector has the key {keys.max()}, expected less than 2^53")
    return keys


def _check_upper_levels(graph: _Graph) -> None:
    """Neighbours of the higher levels, which must reach that level themselves."""
    record = np.dtype([("count", "<u4"), ("slots", "<u4", (graph.connectivity,))])
    for level in range(1, int(graph.levels.max()) + 1):
        starts = graph.starts[graph.levels >= level] + graph.base_bytes + (level - 1) * graph.level_bytes
        for _, lists in _records(graph, starts, record):
            used = np.arange(graph.connectivity) < lists["count"][:, None]
            slots = lists["slots"]
            if lists["count"].max() > graph.connectivity or slots.max() >= len(graph.levels):
                raise _Malformed(f"a node has neighbours of level {level} that there are not")
            if (graph.levels[slots[used]] < level).any():
                raise _Malformed(f"a node has neighbours of level {level} that do not reach it")


def _records(graph: _Graph, starts: Integers, record: np.dtype[Any]) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
    """Records that begin at some bytes of the nodes, some at a time."""
    windows = np.lib.stride_tricks.sliding_window_view(graph.data, record.itemsize)
    for start in range(0, len(starts), _NODES):
        chunk = slice(start, min(start + _NODES, len(starts)))
        yield chunk, windows[starts[chunk]].view(record)[:, 0]
