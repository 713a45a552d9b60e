"""Where a base's weights lie: one name for each tensor of a decoder, whatever the file calls it; read row by row.

Nothing is in memory but the rows that are asked for: files are mapped.
"""

from __future__ import annotations

import functools
import hashlib
import math
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from edgecompose.bundle.files import sha256_of
from edgecompose.errors import CheckpointError, ExportError
from edgecompose.formats.architectures import PACKED
from edgecompose.formats.checkpoint import StoredTensor, read_shard, weight_files
from edgecompose_export.datasets import read_json
from edgecompose_export.decoder_config import DecoderConfig, config_from_gguf, config_from_json
from edgecompose_export.gguf_file import GgufFile, is_later_shard, read_shards
from edgecompose_export.weight_blocks import FLOAT_TYPES, GGUF_FORMS, Blocks, read_blocks

Float = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

EMBEDDING, HEAD, FINAL_NORM = "embedding.weight", "head.weight", "final_norm.weight"
#: Tensors that files hold beside weights, and that say nothing.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$|^rope_(freqs|factors_(long|short))\.weight$")
_SAFETENSORS = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}
_WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_HF_NORMS = {
    "before": {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
    "after": {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
    "around": {
        "attention_in": "input_layernorm", "attention_out": "post_attention_layernorm",
        "mlp_in": "pre_feedforward_layernorm", "mlp_out": "post_feedforward_layernorm",
    },
}  # fmt: skip
_GGUF_NORMS = {
    "attention_in": "attn_norm", "attention_out": "post_attention_norm", "mlp_in": "ffn_norm",
    "mlp_out": "post_ffw_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the decoder lies: the file's name for what holds it, its rows there, and how they are kept.

    `heads` > 0 says that rows of a head stand with rotary pairs side by side. `plus` is added to the stored numbers.
    """

    stored: str
    first: int
    shape: tuple[int, ...]
    heads: int = 0
    plus: float = 0.0


class TensorFile(Protocol):
    """Files of weights, by the names that they use themselves."""

    def types(self) -> Mapping[str, str]:
        """Type of each tensor: one of FLOAT_TYPES, F64, or a GGUF block type."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""

    def raw(self, name: str, rows: slice | npt.NDArray[np.int64]) -> Bytes:
        """Bytes of some rows, (rows, bytes of a row)."""


class WeightSource:
    """The weights of one base.

    Attributes:
        name: what the base is called in messages: file or folder.
        config: what the decoder is.
    """

    def __init__(self, name: str, config: DecoderConfig, files: TensorFile, places: Mapping[str, Place]) -> None:
        self.name, self.config = name, config
        self._files, self._places = files, places
        _check_tensors(name, files, places, config)

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
        """`floats` without what `Place.plus` adds: the numbers as they are in the file."""
        place = self._places[tensor]
        kind = self.type_of(tensor)
        raw = self._raw(place, start, stop)
        if kind in _WIDTH:
            values = as_floats(raw, kind)
        else:
            with np.errstate(invalid="ignore", over="ignore"):  # damaged scales are refused below
                values = np.asarray(dequantize(raw, GGMLQuantizationType[kind]), np.float32)
        if not np.isfinite(values).all():
            raise ExportError(f"base '{self.name}': '{place.stored}' holds numbers that are not finite; copy it again")
        return values.reshape(-1) if len(place.shape) == 1 else values

    def blocks(self, tensor: str, start: int = 0, stop: int | None = None) -> Blocks:
        """Rows of a block-quantised matrix, as the file has them."""
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
        ExportError: no such base, an architecture that is not exported, or tensors that are missing, left over,
            doubled, of another shape or of a type that is not read; all are named.
    """
    return _open_gguf(path) if path.is_file() else _open_folder(path)


def gguf_metadata(path: Path) -> Mapping[str, Any]:
    """Metadata of a GGUF model; of its first shard, where it is split."""
    return read_shards(path)[0].metadata


def weights_digest(path: Path) -> str:
    """sha256 that names a base: of its GGUF file (of the shards' sha256 if it has several), or of its weight files'."""
    try:
        paths = [shard.path for shard in read_shards(path)] if path.is_file() else weight_files(path)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    digests = [sha256_of(p) for p in paths]
    return digests[0] if path.is_file() and len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def tensor_names(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a decoder and its shape, in the order of computation."""
    hidden, widths = config.hidden, config.widths
    layer_norm = config.architecture.norm == "layer"
    yield EMBEDDING, (config.vocabulary, hidden)
    for layer in range(len(config.layers)):
        for norm in config.norms:
            yield f"{layer}.{norm}.weight", (hidden,)
            if layer_norm:
                yield f"{layer}.{norm}.bias", (hidden,)
        if config.architecture.query_key_norm != "none":
            whole = config.architecture.query_key_norm == "width"
            yield f"{layer}.q_norm.weight", (widths["q_proj"][0] if whole else config.head_size,)
            yield f"{layer}.k_norm.weight", (widths["k_proj"][0] if whole else config.head_size,)
        for module in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            yield f"{layer}.{module}.weight", widths[module]
            if module in config.biases:
                yield f"{layer}.{module}.bias", widths[module][:1]
    yield FINAL_NORM, (hidden,)
    if layer_norm:
        yield FINAL_NORM.replace("weight", "bias"), (hidden,)
    if not config.tied:
        yield HEAD, (config.vocabulary, hidden)


def _halves_first(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """Which stored row each row is, where stored rows of a head have rotary pairs side by side."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _packed_place(paths: Mapping[str, str], module: str, config: DecoderConfig) -> tuple[str, int]:
    """Path of what holds a linear module, and its first row there."""
    if module in paths:
        return paths[module], 0
    for whole, parts in PACKED.items():
        if module in parts and whole in paths:
            return paths[whole], sum(config.widths[part][0] for part in parts[: parts.index(module)])
    raise KeyError(module)


def _places(
    config: DecoderConfig, top: Mapping[str, str], block: str, norms: Mapping[str, str], paths: Mapping[str, str],
    *, interleaved: bool, plus: float,
) -> dict[str, Place]:  # fmt: skip
    """Where the tensors of a decoder lie in files that follow a scheme of names.

    Args:
        top: names of the tensors outside blocks, without their ends.
        block: prefix of a block's tensors, with `{}` for its number.
    """
    places = {}
    for name, shape in tensor_names(config):
        parts, end = name.rsplit(".", 1)
        if parts in top:
            norm = parts == "final_norm"
            places[name] = Place(f"{top[parts]}.{end}", 0, shape, plus=plus if norm else 0.0)
            continue
        layer, part = parts.split(".")
        prefix = block.format(layer)
        if part in norms:
            places[name] = Place(f"{prefix}{norms[part]}.{end}", 0, shape, plus=plus)
            continue
        path, first = _packed_place(paths, part, config)
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(part, 0) if interleaved else 0
        places[name] = Place(f"{prefix}{path}.{end}", first, shape, heads)
    return places


def _check_tensors(name: str, files: TensorFile, places: Mapping[str, Place], config: DecoderConfig) -> None:
    """Refuse files that do not hold exactly what the decoder is made of."""
    shapes, types = files.shapes(), files.types()
    rows: dict[str, int] = {}
    for place in places.values():
        rows[place.stored] = rows.get(place.stored, 0) + place.shape[0]
    missing = sorted(stored for stored in rows if stored not in shapes)
    tied_head = {"lm_head.weight"} if config.tied else set()
    unused = sorted(s for s in shapes if s not in rows and s not in tied_head and not _BUFFERS.search(s))
    misshapen = sorted({
        f"{p.stored} {list(shapes[p.stored])}, expected {[rows[p.stored], *p.shape[1:]]}"
        for p in places.values()
        if p.stored in shapes and tuple(shapes[p.stored]) != (rows[p.stored], *p.shape[1:])
    })  # fmt: skip
    unread = sorted(
        f"{stored} ({types[stored]})" for stored in rows
        if stored in types and types[stored] not in _WIDTH and types[stored] not in GGUF_FORMS
    )  # fmt: skip
    parts = [
        (missing, "are missing (an incomplete copy, or one of several files?)"), (misshapen, "have another shape"),
        (unused, "are not part of such a model"),
        (unread, f"have a type that is not read ({', '.join((*FLOAT_TYPES, *GGUF_FORMS))} are)"),
    ]  # fmt: skip
    told = [f"{len(names)} tensors {what}: {_some(names)}" for names, what in parts if names]
    if told:
        raise ExportError(f"base '{name}' ({config.architecture.name}): {'; '.join(told)}; give a whole copy of it")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


class _Shards:
    """Tensors of GGUF shards."""

    def __init__(self, shards: Sequence[GgufFile]) -> None:
        self._by_name = {name: shard for shard in shards for name in shard.tensors}

    @functools.cache  # noqa: B019  # one instance a base
    def types(self) -> Mapping[str, str]:
        return {name: shard.tensors[name].type for name, shard in self._by_name.items()}

    @functools.cache  # noqa: B019
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shard.tensors[name].shape for name, shard in self._by_name.items()}

    def raw(self, name: str, rows: slice | npt.NDArray[np.int64]) -> Bytes:
        return self._by_name[name].data(name)[rows]


def _open_gguf(path: Path) -> WeightSource:
    shards = read_shards(path)
    files = _Shards(shards)
    shapes = files.shapes()
    if "token_embd.weight" not in shapes:
        raise ExportError(f"base '{path.name}': token_embd.weight is missing; give a whole model (or its first shard)")
    factors = {
        name: as_floats(files.raw(f"{name}.weight", slice(None)), "F32").reshape(-1)
        for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")
        if files.types().get(f"{name}.weight") == "F32"
    }
    config = config_from_gguf(shards[0].metadata, shapes, factors, path.name)
    row = config.architecture
    top = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}
    places = _places(
        config, top, "blk.{}.", _GGUF_NORMS, row.gguf_paths, interleaved=row.interleaved, plus=0.0
    )  # fmt: skip
    return WeightSource(path.name, config, files, places)


class _Folder:
    """Tensors of safetensors files, or of PyTorch's, mapped."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, tuple[Path, str, tuple[int, ...], Callable[[], Bytes]]] = {}
        for path in weight_files(folder):
            for name, kind, shape, data in _tensors_of(path):
                if name in self._tensors:
                    first = self._tensors[name][0].name
                    raise ExportError(f"base '{folder}': '{name}' is in {first} and in {path.name}; remove one of them")
                self._tensors[name] = (path, kind, shape, data)

    def types(self) -> Mapping[str, str]:
        return {name: kind for name, (_, kind, _, _) in self._tensors.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape, _) in self._tensors.items()}

    def raw(self, name: str, rows: slice | npt.NDArray[np.int64]) -> Bytes:
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
        return np.frombuffer(mapped, np.uint8, tensor.end - tensor.start, shard.data + tensor.start)

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
        raise ExportError(f"weights '{path}' hold more than dense tensors by their names; convert them to safetensors")
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}

    def bytes_of(tensor: Any) -> Bytes:
        return np.asarray(tensor.contiguous().view(torch.uint8).numpy())

    for name, tensor in state.items():
        yield name, kinds.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), functools.partial(bytes_of, tensor)


def _open_folder(folder: Path) -> WeightSource:
    config = config_from_json(read_config(folder), folder.name)
    try:
        return WeightSource(folder.name, config, _Folder(folder), folder_places(config))
    except CheckpointError as error:
        raise ExportError(str(error)) from error


def folder_places(config: DecoderConfig) -> dict[str, Place]:
    """Where each tensor of a decoder lies in a Hugging Face folder."""
    row = config.architecture
    top = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    norms = dict(_HF_NORMS[row.norms], q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    plus = 1.0 if row.unit_offset else 0.0
    return _places(config, top, "model.layers.{}.", norms, row.paths, interleaved=False, plus=plus)


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
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ExportError(f"'{folder / 'config.json'}' is no object; copy it again")
    return config


def locate_base(path: Path) -> Path:
    """The base at `path`: a folder with config.json, a GGUF file, or the GGUF file (first shard) that a folder holds.

    Raises:
        ExportError: nothing there that is a base.
    """
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ExportError(f"base '{path}' is neither a folder nor a .gguf file; give one of them")
        return path
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    first = [file for file in files if not is_later_shard(file)]
    if len(first) == 1:
        return first[0]
    if (path / "adapter_config.json").is_file():
        raise ExportError(f"'{path}' holds an adapter (adapter_config.json), expected a base; give the base it is for")
    raise ExportError(
        f"base '{path}' has no config.json but {len(first)} GGUF models; give a Hugging Face folder or one GGUF file"
    )
