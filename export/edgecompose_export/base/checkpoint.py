"""A base for transformers: its float model in memory, or a Hugging Face folder of its float weights."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgecompose.bundle.atomic import new_folder
from edgecompose.errors import ExportError
from edgecompose.formats.checkpoint import BASE_KEY, CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, from_float32
from edgecompose_export.base.source import Base
from edgecompose_export.decoder.config_to_json import config_to_json
from edgecompose_export.weights.blocks import Float
from edgecompose_export.weights.places import Place, folder_places
from edgecompose_export.weights.source import read_config

DType = Literal["float32", "float16", "bfloat16"]
_STORED = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
#: Largest number of bytes in a file of weights; transformers splits at the same size.
_LARGEST_SHARD = 5_000_000_000
#: Weights of a chunk that is converted at once.
_CHUNK = 1 << 23
#: Files of a base folder that the checkpoint copies, beside config.json and weights.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a Hugging Face folder, and the tensors of the decoder that are its rows, in order."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, Place], ...]


def load_model(base: Base, dtype: Any = None) -> Any:
    """The causal language model (transformers), float32 unless another torch dtype is named, in eval mode.

    Raises:
        ExportError: transformers cannot load it.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    dtype = dtype or torch.float32
    try:
        if base.path.is_dir():
            return AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype, local_files_only=True).eval()
        fields = _config(base)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
    except ExportError:
        raise
    except Exception as error:  # transformers and safetensors raise classes of all kinds on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ExportError(f"base '{base.path}' cannot be loaded as a causal model: {reason}") from error
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for tensor in _tensors(base):
            parameter, row = parameters.pop(tensor.name), 0
            for values in _values(base, tensor):
                parameter[row : row + len(values)].copy_(torch.from_numpy(values))
                row += len(values)
    if parameters:
        raise ExportError(f"base '{base.path}': transformers' class also has {', '.join(sorted(parameters)[:4])}")
    return model.eval()


def write_checkpoint(base: Base, output: Path, dtype: DType = "float32") -> str:
    """Write a Hugging Face folder of float weights that names this base, for `edgecompose compose --checkpoint`.

    Weights are copied from file to file a few rows at a time.

    Args:
        output: does not exist yet; appears when it is complete.

    Returns:
        The identity of the base in the folder.

    Raises:
        ExportError: `output` exists or cannot be written, or transformers has no class for such a decoder.
    """
    fields = _config(base) | {"dtype": dtype}
    identity = base.identity
    try:
        with new_folder(output) as work:
            if output.exists():
                raise ExportError(f"'{output}' exists; remove it or give another folder")
            _write_json(work / CONFIG_FILE, fields)
            _write_tokenizer(base, work)
            _write_weights(base, work, dtype, metadata={"format": "pt", BASE_KEY: identity})
    except OSError as error:
        reason = str(error) if error.errno is None else os.strerror(error.errno)
        raise ExportError(f"'{output}' cannot be written: {reason}; give another folder") from error
    return identity


def _config(base: Base) -> dict[str, Any]:
    if base.path.is_dir():
        return {key: value for key, value in read_config(base.path).items() if key not in ("torch_dtype", "dtype")}
    fields, tokenizer = config_to_json(base.weights.config, base.weights.name), base.tokenizer
    for name, text in (("bos", tokenizer.bos), ("eos", tokenizer.eos), ("pad", tokenizer.pad)):
        fields[f"{name}_token_id"] = tokenizer.token_id(text)
    return fields


def _write_tokenizer(base: Base, work: Path) -> None:
    if base.path.is_dir():
        for name in _COPIED:
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, work / name)
        if not (work / "tokenizer.json").is_file():
            base.tokenizer.write(work / "tokenizer.json")
        return
    tokenizer = base.tokenizer
    tokenizer.write(work / "tokenizer.json")
    texts = {f"{name}_token": getattr(tokenizer, name) for name in ("bos", "eos", "unk", "pad")}
    _write_json(
        work / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": base.weights.config.context,
            **{k: v for k, v in texts.items() if v is not None},
        },
    )
    _write_json(work / "generation_config.json", {"eos_token_id": list(tokenizer.end_tokens)})
    if tokenizer.template is not None:
        (work / "chat_template.jinja").write_text(tokenizer.template, encoding="utf-8")


def _tensors(base: Base) -> Iterator[_Tensor]:
    places = folder_places(base.weights.config)
    parts: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        parts.setdefault(place.stored, []).append((name, place))
    for stored, pairs in parts.items():
        pairs.sort(key=lambda pair: pair[1].first)
        rows = sum(place.shape[0] for _, place in pairs)
        yield _Tensor(stored, (rows, *pairs[0][1].shape[1:]), tuple(pairs))


def _values(base: Base, tensor: _Tensor) -> Iterator[Float]:
    """Values of a tensor as transformers stores them, a few rows at a time."""
    for name, place in tensor.parts:
        shift = np.float32(base.weights.place(name).plus - place.plus)
        if len(place.shape) == 1:
            ranges = [(0, place.shape[0])]
        else:
            step = max(1, _CHUNK // place.shape[1])
            ranges = [(start, min(start + step, place.shape[0])) for start in range(0, place.shape[0], step)]
        for start, stop in ranges:
            values = base.weights.stored_floats(name, start, stop)
            yield values + shift if shift else values


def _write_weights(base: Base, work: Path, dtype: DType, *, metadata: Mapping[str, str]) -> None:
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in _tensors(base):
        width = math.prod(tensor.shape) * _STORED[dtype][1]
        if shards[-1] and size + width > _LARGEST_SHARD:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += width
    if len(shards) == 1:
        _write_shard(base, work / WEIGHTS_FILE, shards[0], dtype=dtype, metadata=metadata)
        return
    files = {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}
    for file, shard in files.items():
        _write_shard(base, work / file, shard, dtype=dtype, metadata=metadata)
    total = sum(math.prod(t.shape) for shard in shards for t in shard) * _STORED[dtype][1]
    weight_map = {tensor.name: file for file, shard in files.items() for tensor in shard}
    _write_json(work / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(base: Base, path: Path, tensors: list[_Tensor], *, dtype: DType, metadata: Mapping[str, str]) -> None:
    stored, width = _STORED[dtype]
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * width
        header[tensor.name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for values in _values(base, tensor):
                if dtype == "float16" and np.abs(values).max() > np.finfo(np.float16).max:
                    raise ExportError(
                        f"base '{base.weights.name}': '{tensor.name}' holds {np.abs(values).max():.3g}, more than "
                        "float16 can store; use --dtype bfloat16"
                    )
                stream.write(from_float32(values, stored))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
