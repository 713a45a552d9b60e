"""The weights of a base, read row by row. Each tensor of a decoder has one name, independent of the file's format.

Files are mapped, so only the rows that a caller reads are in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from edgecompose.bundle.records import read_json
from edgecompose.errors import CheckpointError, ExportError
from edgecompose.formats.gguf_file import read_shards
from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.decoder.config_from_gguf import config_from_gguf
from edgecompose_export.decoder.config_from_json import config_from_json
from edgecompose_export.weights.blocks import Blocks, Bytes, Float
from edgecompose_export.weights.files import GgufShards, TensorFile, TensorFolder
from edgecompose_export.weights.gguf_blocks import FLOAT_TYPES, GGUF_FORMS, read_blocks
from edgecompose_export.weights.places import Place, folder_places, gguf_places, linear_tensors

#: Tensors beside the weights that files may hold, and that are ignored.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$|^rope_(freqs|factors_(long|short))\.weight$")
_FLOAT_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}


class WeightSource:
    """The weights of one base.

    Attributes:
        name: of the file or folder, for messages.
        config: of the decoder.
    """

    def __init__(self, name: str, config: DecoderConfig, files: TensorFile, places: Mapping[str, Place]) -> None:
        self.name, self.config = name, config
        self._files, self._places = files, places
        _check_tensors(name, files, places=places, config=config)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._places

    def type_of(self, tensor: str) -> str:
        """One of FLOAT_TYPES, F64, or a GGUF block type."""
        return self._files.types()[self._places[tensor].stored]

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor of the decoder."""
        return self._places[tensor].shape

    def place(self, tensor: str) -> Place:
        """Where a tensor of the decoder lies in the files."""
        return self._places[tensor]

    def floats(self, tensor: str, start: int = 0, stop: int | None = None) -> Float:
        """Values of a vector, or of rows `start` .. `stop` of a matrix, float32, as ggml dequantises them."""
        values, place = self.stored_floats(tensor, start, stop), self._places[tensor]
        return values + np.float32(place.plus) if place.plus else values

    def stored_floats(self, tensor: str, start: int = 0, stop: int | None = None) -> Float:
        """The numbers in the file: `floats` without `Place.plus`."""
        place = self._places[tensor]
        kind = self.type_of(tensor)
        raw = self._raw(place, start, stop)
        if kind in _FLOAT_SIZES:
            values = as_floats(raw, kind)
        else:
            with np.errstate(invalid="ignore", over="ignore"):  # the check below refuses damaged scales
                values = np.asarray(dequantize(raw, GGMLQuantizationType[kind]), np.float32)
        if not np.isfinite(values).all():
            raise ExportError(f"base '{self.name}': '{place.stored}' holds numbers that are not finite; copy it again")
        return values.reshape(-1) if len(place.shape) == 1 else values

    def blocks(self, tensor: str, start: int = 0, stop: int | None = None) -> Blocks:
        """Rows of a block-quantised matrix, in the blocks of the file."""
        place = self._places[tensor]
        try:
            return read_blocks(self._raw(place, start, stop), self.type_of(tensor))
        except ExportError as error:
            raise ExportError(f"base '{self.name}': '{place.stored}': {error}") from error

    def _raw(self, place: Place, start: int, stop: int | None) -> Bytes:
        if len(place.shape) == 1 and not place.heads:
            return self._files.raw(place.stored, slice(0, None))
        rows = place.shape[0]
        stop = rows if stop is None else stop
        if len(place.shape) == 1:  # a bias: the rows are single numbers
            flat = self._files.raw(place.stored, slice(0, None)).reshape(rows, -1)
            return np.ascontiguousarray(flat[_halves_first(rows, place.heads)])
        if place.heads:
            return self._files.raw(place.stored, _halves_first(rows, place.heads)[start:stop] + place.first)
        return self._files.raw(place.stored, slice(place.first + start, place.first + stop))


def as_floats(raw: Bytes, kind: str) -> Float:
    """Bytes of float rows (rows, bytes) as float32."""
    raw = np.ascontiguousarray(raw)
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return raw.view({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[kind]).astype(np.float32)


def open_weights(path: Path) -> WeightSource:
    """The weights of a Hugging Face folder, or of a GGUF file with all its shards.

    Raises:
        ExportError: no such base, an architecture that cannot be exported, or tensors that are missing, unused,
            doubled, of another shape or of an unknown type; the message names them.
    """
    return _open_gguf(path) if path.is_file() else _open_folder(path)


def _open_gguf(path: Path) -> WeightSource:
    shards = read_shards(path)
    files = GgufShards(shards)
    shapes = files.shapes()
    if "token_embd.weight" not in shapes:
        raise ExportError(f"base '{path.name}': token_embd.weight is missing; give a whole model (or its first shard)")
    factors = {
        name: as_floats(files.raw(f"{name}.weight", slice(None)), "F32").reshape(-1)
        for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")
        if files.types().get(f"{name}.weight") == "F32"
    }
    config = config_from_gguf(shards[0].metadata, shapes=shapes, factors=factors, name=path.name)
    return WeightSource(path.name, config, files=files, places=gguf_places(config))


def _open_folder(folder: Path) -> WeightSource:
    config = config_from_json(read_config(folder), folder.name)
    try:
        return WeightSource(folder.name, config, files=TensorFolder(folder), places=folder_places(config))
    except CheckpointError as error:
        raise ExportError(str(error)) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        ExportError: there is none, it is damaged, or the folder holds an adapter, not a base.
    """
    if (folder / "adapter_config.json").is_file():
        raise ExportError(
            f"'{folder}' holds an adapter (adapter_config.json), expected a base; give the base that it was trained "
            "on, or take adapter_config.json and the adapter's weights out of the folder"
        )
    config = read_json(folder / "config.json", ExportError, "make it again")
    if not isinstance(config, dict):
        raise ExportError(
            f"'{folder / 'config.json'}' holds a {type(config).__name__}, expected a JSON object; copy it again"
        )
    return config


def _check_tensors(name: str, files: TensorFile, *, places: Mapping[str, Place], config: DecoderConfig) -> None:
    """Refuse files that do not hold exactly the tensors of the decoder."""
    shapes, types = files.shapes(), files.types()
    rows: dict[str, int] = {}
    for place in places.values():
        rows[place.stored] = rows.get(place.stored, 0) + place.shape[0]
    missing = sorted(stored for stored in rows if stored not in shapes)
    tied_head = {"lm_head.weight"} if config.tied else set()
    unused = sorted(s for s in shapes if s not in rows and s not in tied_head and not _BUFFERS.search(s))
    misshapen = sorted(
        {
            f"{p.stored} {list(shapes[p.stored])}, expected {[rows[p.stored], *p.shape[1:]]}"
            for p in places.values()
            if p.stored in shapes and tuple(shapes[p.stored]) != (rows[p.stored], *p.shape[1:])
        }
    )
    unread = sorted(
        f"{stored} ({types[stored]})"
        for stored in rows
        if stored in types and types[stored] not in _FLOAT_SIZES and types[stored] not in GGUF_FORMS
    )
    parts = [
        (missing, "are missing (an incomplete copy, or one of several files?)"),
        (misshapen, "have another shape"),
        (unused, "are not part of such a model"),
        (unread, f"have an unknown type, expected one of {', '.join((*FLOAT_TYPES, *GGUF_FORMS))}"),
    ]
    problems = [f"{len(names)} tensors {what}: {_some(names)}" for names, what in parts if names]
    if problems:
        raise ExportError(f"base '{name}' ({config.architecture.name}): {'; '.join(problems)}; give a whole copy of it")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _halves_first(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """The stored row of each row, where stored rows of a head have rotary pairs side by side."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def linear_weights(source: WeightSource) -> int:
    """Weights of all linear modules."""
    return sum(int(np.prod(source.shape(tensor))) for tensor in linear_tensors(source.config))
