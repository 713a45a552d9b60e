"""GGUF files: metadata, and tensors as they lie in the file, mapped into memory; all shards of a split one.

The package gguf reads the same files, in 7 to 10 seconds and 500 to 700 MB for a vocabulary of 150 to 260 thousand
tokens (it makes an array of each token). Here a header takes a quarter of a second, and no length in a damaged file is
believed before it is compared with the size of the file.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.errors import EdgeComposeError, ExportError
from edgecompose.formats.checkpoint import text_instead

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: Numbers of the metadata, by GGUF's type id.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LARGEST_DEPTH = 4
#: Bytes of a header, entries of a list in it, and of all its lists, at most. The largest vocabularies have 16 MB and
#: 0.6 million entries.
_LARGEST_HEADER, _LARGEST_LIST, _MOST_ENTRIES = 1 << 27, 1 << 22, 1 << 23
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a file: its type's name, its shape as NumPy orders it, and where its bytes begin in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufFile:
    """One file: metadata, tensors by name, and the alignment of tensors in bytes."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Bytes of a tensor's rows, (rows, bytes of a row) uint8, rows being those of the flattened leading axes.

        They are mapped, not copied, by a map of their own: what was read leaves the memory with the array.
        """
        tensor = self.tensors[name]
        with self.path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(mapped, np.uint8, tensor.bytes, tensor.offset)
        return flat.reshape(math.prod(tensor.shape[:-1]), -1)


class _Header:
    """Reads the header of a mapped file, never past its end."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.size, self.position, self.entries = path, len(data), 0, 0
        self._data = data[:_LARGEST_HEADER]
        self._whole = len(data) <= _LARGEST_HEADER

    def fail(self, what: str) -> ExportError:
        return ExportError(f"GGUF file '{self.path}': {what}; the file is damaged or incomplete, copy it again")

    @property
    def end(self) -> str:
        """Where nothing more can be read, for messages."""
        return f"{'the file ends' if self._whole else 'a header ends at the latest'} at byte {len(self._data)}"

    def take(self, size: int, what: str) -> memoryview:
        end = self.position + size
        if end > len(self._data):
            raise self.fail(f"{what} at byte {self.position} takes {size} bytes, {self.end}")
        self.position, start = end, self.position
        return self._data[start:end]

    def count(self, what: str, smallest: int) -> int:
        """The length of a list whose entries take so many bytes at least."""
        count: int = self.number("Q", what)
        if count > _LARGEST_LIST or count * smallest > len(self._data) - self.position:
            raise self.fail(f"{what} has {count} entries at byte {self.position}, {self.end}")
        self.entries += count
        if self.entries > _MOST_ENTRIES:
            raise self.fail(
                f"{what} and the lists before it have {self.entries} entries, expected {_MOST_ENTRIES} at most"
            )
        return count

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))[0]

    def text(self, what: str) -> str:
        raw = bytes(self.take(self.number("Q", what), what))
        return raw.decode("utf-8", "surrogateescape" if what.startswith("value") else "replace")

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        what = f"value of {key!r:.60}"
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY or depth == _LARGEST_DEPTH:
            raise self.fail(f"{what} is of the unknown type {kind}")
        inner = self.number("I", what)
        code = _NUMBERS.get(inner)
        count = self.count(what, struct.calcsize(code) if code else 8)
        if code:
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code), what)))
        if inner == _STRING:
            return self._strings(count, what)
        return [self.value(inner, key, depth + 1) for _ in range(count)]

    def _strings(self, count: int, what: str) -> list[str]:
        """A list of strings; hundreds of thousands, so without a call for each."""
        data, position, end = self._data, self.position, len(self._data)
        unpack, strings = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            if position + 8 > end:
                raise self.fail(f"{what} continues, {self.end}")
            (size,) = unpack(data, position)
            position += 8
            if size > end - position:
                raise self.fail(f"{what} has a string of {size} bytes at byte {position}, {self.end}")
            strings.append(str(data[position : position + size], "utf-8", "surrogateescape"))
            position += size
        self.position = position
        return strings


def require_gguf() -> None:
    """Make sure that the package gguf is there, which knows the types of numbers in such files.

    Raises:
        EdgeComposeError: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise EdgeComposeError("GGUF files need the package gguf; run: pip install 'edgecompose[gguf]'")


def read_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file, of either kind of content (model or adapter).

    Raises:
        ExportError: no GGUF file, one of the other byte order or of an unknown version, a damaged or incomplete one,
            or a tensor twice.
        EdgeComposeError: the package gguf is not installed.
    """
    require_gguf()
    try:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(_Header(path, memoryview(mapped)))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(
            f"GGUF file '{path}' cannot be read: {reason}; see that it may be read, or copy it again"
        ) from error


def read_shards(path: Path) -> tuple[GgufFile, ...]:
    """A GGUF model with all its shards, of which `path` is any one; the first shard comes first.

    Raises:
        ExportError: a shard is missing or of another model, or `read_gguf` refuses one.
    """
    first = read_gguf(path)
    count = first.metadata.get("split.count", 1)
    named = _SHARD.search(path.name)
    if not isinstance(count, int) or count <= 1:
        if named and int(named[2]) > 1:
            raise ExportError(
                f"GGUF file '{path}' is called shard {int(named[1])} of {int(named[2])} but names no other shard; "
                "give it the name of a whole file if it is one"
            )
        return (first,)
    if not named or int(named[2]) != count:
        raise ExportError(
            f"GGUF file '{path}' is one of {count} shards but not called NAME-00001-of-{count:05}.gguf; give all "
            "shards their published names, or join them with: llama-gguf-split --merge"
        )
    stem = path.name[: named.start()]
    paths = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise ExportError(
            f"GGUF file '{path}' is one of {count} shards, {', '.join(missing[:4])} "
            f"{'is' if len(missing) == 1 else 'are'} missing; put all shards into one folder"
        )
    shards = tuple(first if p == path else read_gguf(p) for p in paths)
    for number, shard in enumerate(shards):
        if (shard.metadata.get("split.no"), shard.metadata.get("split.count")) != (number, count):
            raise ExportError(f"GGUF file '{shard.path}' does not say that it is shard {number + 1} of {count}")
    total, present = first.metadata.get("split.tensors.count"), sum(len(shard.tensors) for shard in shards)
    if isinstance(total, int) and total != present:
        raise ExportError(f"the {count} shards of '{path}' hold {present} tensors, expected {total}; copy them again")
    _refuse_doubles(path, (name for shard in shards for name in shard.tensors))
    return shards


def is_later_shard(path: Path) -> bool:
    """Whether a file's name says that it is a shard of a split model, and not the first."""
    named = _SHARD.search(path.name)
    return named is not None and int(named[1]) > 1


def _parse(header: _Header) -> GgufFile:
    path = header.path
    magic = bytes(header.take(4, "magic"))
    if magic != MAGIC:
        header.position = 0
        text = text_instead(bytes(header.take(min(header.size, 64), "magic")))
        text = text or f"begins with {magic!r}, expected {MAGIC!r}; it is no GGUF file, give one"
        raise ExportError(f"GGUF file '{path}': the file {text}")
    version = header.number("I", "version")
    if version not in VERSIONS and int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise ExportError(f"GGUF file '{path}' is big-endian; convert it for this kind of machine")
    if version not in VERSIONS:
        raise ExportError(f"GGUF file '{path}' is of version {version}, expected one of {VERSIONS}; convert it again")
    count, keys = header.number("Q", "tensor count"), header.number("Q", "key count")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = header.text("key")
        if key in metadata:
            raise header.fail(f"the key {key!r:.60} stands there twice")
        kind = header.number("I", f"type of {key!r:.60}")
        metadata[key] = header.value(kind, key)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise header.fail(f"general.alignment is {alignment!r:.40}, expected a power of 2")
    described = [_tensor(header) for _ in range(count)]
    _refuse_doubles(path, (tensor.name for tensor in described))
    start, end = -(-header.position // alignment) * alignment, 0
    tensors = {}
    for tensor in described:
        what = f"tensor {tensor.name!r:.60} ({tensor.type}, {list(tensor.shape)})"
        if tensor.offset != end:  # as llama.cpp: one behind the other
            raise header.fail(f"{what} begins at byte {tensor.offset} of the data, expected {end}")
        if start + end + tensor.bytes > header.size:
            raise header.fail(
                f"{what} takes bytes {start + end} to {start + end + tensor.bytes}, the file ends at byte {header.size}"
            )
        tensors[tensor.name] = replace(tensor, offset=start + end)
        end = -(-(end + tensor.bytes) // alignment) * alignment
    return GgufFile(path, metadata, tensors)


def _tensor(header: _Header) -> GgufTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = header.text("tensor name")
    axes = header.number("I", f"axes of {name!r:.60}")
    if not 1 <= axes <= 4:
        raise header.fail(f"tensor {name!r:.60} has {axes} axes")
    shape = tuple(header.number("Q", f"shape of {name!r:.60}") for _ in range(axes))[::-1]
    kind, offset = header.number("I", f"type of {name!r:.60}"), header.number("Q", f"offset of {name!r:.60}")
    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        raise ExportError(
            f"GGUF file '{header.path}': tensor {name!r:.60} is of type {kind}, which is not known here; "
            "quantise the model to one of the types that the guide lists"
        ) from None
    block, size = GGML_QUANT_SIZES[known]
    if shape[-1] % block or min(shape) < 1:
        raise header.fail(f"tensor {name!r:.60} has shape {shape}, rows of {known.name} are multiples of {block}")
    return GgufTensor(name, known.name, shape, offset=offset, bytes=math.prod(shape) // block * size)


def _refuse_doubles(path: Path, names: Iterator[str]) -> None:
    seen: set[str] = set()
    doubled = sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    shown = [name if name.isprintable() else repr(name) for name in doubled[:4]]
    if doubled:
        raise ExportError(f"GGUF file '{path}' holds a tensor twice: {', '.join(shown)}; convert it again")
