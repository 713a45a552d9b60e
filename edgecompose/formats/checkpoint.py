"""A Hugging Face folder of float weights: its files, its tensors, and the base that they are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from edgecompose.bundle.files import sha256_of
from edgecompose.bundle.records import read_json
from edgecompose.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
#: Metadata of weights that were converted: the identity of what they were converted from.
BASE_KEY = "edgecompose_base"
#: What safetensors calls the float types that weights may have here.
FLOAT_TYPES = ("F32", "F16", "BF16")
_CHUNK = 1 << 22

Float = npt.NDArray[np.float32]
Advance = Callable[[int], None]
#: NumPy's names of the float types that it has.
_NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def _ignore(count: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file; `start` and `end` are bytes of the file's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its metadata, where its data begins, and its tensors in the order of their bytes."""

    path: Path
    metadata: Mapping[str, str]
    data: int
    tensors: tuple[StoredTensor, ...]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.data + max((tensor.end for tensor in self.tensors), default=0)


@dataclass(frozen=True, slots=True)
class FloatCheckpoint:
    """The weights of a folder, shard by shard."""

    folder: Path
    shards: tuple[Shard, ...]

    @property
    def bytes(self) -> int:
        """Size of all weights."""
        return sum(shard.bytes for shard in self.shards)

    def is_recorded(self, identity: str) -> bool:
        """Whether every shard says that it was converted from the base of that identity."""
        return all(shard.metadata.get(BASE_KEY) == identity for shard in self.shards)

    def check_base(self, identity: str, *, advance: Advance = _ignore) -> None:
        """Check that these are the weights of a base, which is recorded in them, or else computed from all their bytes.

        Args:
            identity: that of the base, as `weights_identity` computes it.
            advance: called with the bytes that were hashed, as they are.

        Raises:
            CheckpointError: another base.
        """
        if self.is_recorded(identity):
            return
        actual = weights_identity(self.folder, advance=advance)
        if actual != identity:
            raise CheckpointError(
                f"checkpoint '{self.folder}' is {actual[:12]}…, the bundle's base was exported from {identity[:12]}…; "
                "give the folder that it was exported from, or what edgecompose-export checkpoint makes of its GGUF"
            )


def open_checkpoint(folder: Path) -> FloatCheckpoint:
    """The weights of a Hugging Face folder, one file or shards with an index; no tensor is read yet.

    Raises:
        CheckpointError: no such folder, no safetensors weights, damaged ones, or quantised ones.
    """
    config = _read_object(folder / CONFIG_FILE)
    if "quantization_config" in config:
        raise CheckpointError(f"checkpoint '{folder}' is quantised ({CONFIG_FILE} says so); give the float base")
    shards = tuple(read_shard(folder / name) for name in _shard_names(folder))
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name.endswith(".weight") and tensor.dtype not in FLOAT_TYPES:
                raise CheckpointError(
                    f"checkpoint '{folder}': '{tensor.name}' is of type {tensor.dtype}; {', '.join(FLOAT_TYPES)} are "
                    "merged into, so give the float base"
                )
    return FloatCheckpoint(folder, shards)


def weights_identity(folder: Path, *, advance: Advance = _ignore) -> str:
    """sha256 over the sha256 of each weight file of a folder, in name order.

    Raises:
        CheckpointError: there is none.
    """
    paths = weight_files(folder)
    return hashlib.sha256("".join(sha256_of(path, advance=advance) for path in paths).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, in name order: what transformers would load, and nothing beside it.

    Raises:
        CheckpointError: there is none, or one that the index names is missing.
    """
    for single, index in ((WEIGHTS_FILE, INDEX_FILE), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            paths = [folder / name for name in _indexed_names(folder, index)]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise CheckpointError(
                    f"checkpoint '{folder}': {index} names {', '.join(missing[:4])}, which "
                    f"{'is' if len(missing) == 1 else 'are'} not there; copy all shards"
                )
            return paths
    raise CheckpointError(f"'{folder}' holds no weights; expected {WEIGHTS_FILE}, or shards with {INDEX_FILE}")


def text_instead(start: bytes) -> str | None:
    """What a file is that should hold weights and begins with these bytes of text, and what to do; None if no text."""
    if start.startswith(b"version https://git-lfs"):
        return "is a git LFS pointer, not the file that it stands for; fetch that with: git lfs pull"
    if start.lstrip().startswith((b"<!", b"<html", b"<HTML", b"<?xml")):
        return "is a web page, not a model; download the file again"
    return None


def read_shard(path: Path) -> Shard:
    """The header of a safetensors file.

    Raises:
        CheckpointError: it cannot be read, or is no such file.
    """
    try:
        with path.open("rb") as stream:
            text = text_instead(stream.read(64))
        if text is not None:
            raise CheckpointError(f"weights '{path}': the file {text}")
        with safetensors.safe_open(path, framework="np"), path.open("rb") as stream:  # it checks every offset
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"weights '{path}' cannot be read: {error!s:.300}; copy them again") from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = [StoredTensor(k, v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items()]
    return Shard(path, metadata, 8 + size, tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))))


def write_shard(
    shard: Shard,
    target: Path,
    metadata: Mapping[str, str],
    changes: Mapping[str, Callable[[bytes], bytes]],
    *,
    advance: Advance = _ignore,
) -> None:
    """Write a copy of a shard with other metadata and some tensors changed; what is not changed is the same bytes.

    Args:
        changes: name of a tensor -> its new bytes from its old ones, as many of them.
        advance: called with the bytes that were read, as they are.

    Raises:
        OSError: it cannot be read or written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for tensor in shard.tensors:
        offsets = [tensor.start, tensor.end]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with shard.path.open("rb") as source, target.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        source.seek(shard.data)
        for tensor in shard.tensors:
            size = tensor.end - tensor.start
            if tensor.name in changes:
                stream.write(changes[tensor.name](source.read(size)))
                advance(size)
                continue
            for start in range(0, size, _CHUNK):
                chunk = source.read(min(_CHUNK, size - start))
                stream.write(chunk)
                advance(len(chunk))


def to_float32(content: bytes, dtype: str) -> Float:
    """Numbers of a float type (F64, F32, F16, BF16; little-endian) as float32, in memory that may be written to."""
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # numbers of 64 bits may become infinite, which callers refuse
        return np.frombuffer(content, _NUMPY_TYPES[dtype]).astype(np.float32)


def from_float32(values: Float, dtype: str) -> bytes:
    """The bytes of numbers in a float type (F32, F16, BF16), rounded to the nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        quiet = (bits >> 16) | 0x40  # rounding could make a NaN an infinity
        return np.where(np.isnan(values), quiet, rounded).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        return values.astype(_NUMPY_TYPES[dtype]).tobytes()


def _shard_names(folder: Path) -> list[str]:
    """Weight files in the order in which transformers looks for them."""
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(
            f"checkpoint '{folder}' has neither {WEIGHTS_FILE} nor {INDEX_FILE}; make them with: "
            "edgecompose-export checkpoint SOURCE -o FOLDER"
        )
    return _indexed_names(folder, INDEX_FILE)


def _indexed_names(folder: Path, index: str) -> list[str]:
    files = _read_object(folder / index).get("weight_map")
    names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"checkpoint '{folder}': {index} names no files beside it; copy it again")
    return names


def _read_object(path: Path) -> dict[str, Any]:
    advice = "give a Hugging Face folder"
    fields = read_json(path, CheckpointError, advice, place=f"checkpoint '{path.parent}': {path.name}")
    if not isinstance(fields, dict):
        raise CheckpointError(f"checkpoint '{path.parent}': {path.name} is no object; {advice}")
    return fields
