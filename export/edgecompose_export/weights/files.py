"""Files of weights, mapped into memory: GGUF shards, safetensors and PyTorch files."""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgecompose.errors import CheckpointError, ExportError
from edgecompose.formats.checkpoint import StoredTensor, read_shard, weight_files
from edgecompose.formats.gguf_file import GgufFile
from edgecompose_export.weights.blocks import Bytes

_SAFETENSORS = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}


class TensorFile(Protocol):
    """Files of weights; tensors have the names that the files use."""

    def types(self) -> Mapping[str, str]:
        """Type of each tensor: one of FLOAT_TYPES, F64, or a GGUF block type."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""

    def raw(self, name: str, rows: slice | npt.NDArray[np.int64]) -> Bytes:
        """Bytes of some rows, (rows, bytes of a row)."""


class GgufShards:
    """Tensors of GGUF shards."""

    def __init__(self, shards: Sequence[GgufFile]) -> None:
        self._by_name = {name: shard for shard in shards for name in shard.tensors}

    @functools.cache  # noqa: B019  # one instance a base
    def types(self) -> Mapping[str, str]:
        """As `TensorFile`."""
        return {name: shard.tensors[name].type for name, shard in self._by_name.items()}

    @functools.cache  # noqa: B019
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As `TensorFile`."""
        return {name: shard.tensors[name].shape for name, shard in self._by_name.items()}

    def raw(self, name: str, rows: slice | npt.NDArray[np.int64]) -> Bytes:
        """As `TensorFile`."""
        return self._by_name[name].data(name)[rows]


class TensorFolder:
    """Tensors of the safetensors files or the PyTorch files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, tuple[Path, str, tuple[int, ...], Callable[[], Bytes]]] = {}
        for path in weight_files(folder):
            for name, kind, shape, data in _tensors_of(path):
                if name in self._tensors:
                    first = self._tensors[name][0].name
                    raise ExportError(f"base '{folder}': '{name}' is in {first} and in {path.name}; remove one of them")
                self._tensors[name] = (path, kind, shape, data)

    def types(self) -> Mapping[str, str]:
        """As `TensorFile`."""
        return {name: kind for name, (_, kind, _, _) in self._tensors.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As `TensorFile`."""
        return {name: shape for name, (_, _, shape, _) in self._tensors.items()}

    def raw(self, name: str, rows: slice | npt.NDArray[np.int64]) -> Bytes:
        """As `TensorFile`."""
        _, _, shape, data = self._tensors[name]
        return data().reshape(math.prod(shape[:-1]), -1)[rows]


def _tensors_of(path: Path) -> Iterable[tuple[str, str, tuple[int, ...], Callable[[], Bytes]]]:
    return _tensors_of_torch(path) if path.suffix == ".bin" else _tensors_of_safetensors(path)


def _tensors_of_safetensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], Callable[[], Bytes]]]:
    try:
        shard = read_shard(path)
    except CheckpointError as error:
        raise ExportError(str(error)) from error

    def bytes_of(tensor: StoredTensor) -> Bytes:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, np.uint8, count=tensor.end - tensor.start, offset=shard.data + tensor.start)

    for tensor in shard.tensors:
        yield (
            tensor.name,
            _SAFETENSORS.get(tensor.dtype, tensor.dtype),
            tensor.shape,
            functools.partial(bytes_of, tensor),
        )


def _tensors_of_torch(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], Callable[[], Bytes]]]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises errors of all kinds on damaged or old files
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"weights '{path}' cannot be read: {reason}; convert them to safetensors") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        for name, tensor in state.items()
    ):
        raise ExportError(f"weights '{path}' hold other objects than named dense tensors; convert them to safetensors")
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}

    def bytes_of(tensor: Any) -> Bytes:
        return np.asarray(tensor.contiguous().view(torch.uint8).numpy())

    for name, tensor in state.items():
        yield name, kinds.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), functools.partial(bytes_of, tensor)
