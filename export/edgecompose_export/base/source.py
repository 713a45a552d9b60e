"""Opens a base on disk: finds it, and reads its configuration, its weights and its tokenizer."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompose.bundle.files import sha256_of
from edgecompose.errors import CheckpointError, ExportError
from edgecompose.formats.checkpoint import weight_files
from edgecompose.formats.gguf_file import is_later_shard, read_shards
from edgecompose_export.tokenizer.base_tokenizer import BaseTokenizer
from edgecompose_export.tokenizer.folder import tokenizer_of_folder
from edgecompose_export.tokenizer.gguf import tokenizer_of_gguf
from edgecompose_export.weights.source import WeightSource, open_weights


@dataclass(frozen=True)
class Base:
    """A Hugging Face folder or a GGUF file (the first of its shards)."""

    path: Path
    weights: WeightSource
    tokenizer: BaseTokenizer

    @functools.cached_property
    def identity(self) -> str:
        """sha256 that identifies the base (`weights_digest`); this reads all bytes of the weights."""
        return weights_digest(self.path)


def open_base(path: Path) -> Base:
    """Open a Hugging Face folder, a GGUF file (any shard of it), or a folder that holds one GGUF model.

    Only headers and the tokenizer are read.

    Raises:
        ExportError: no base, or one that cannot be exported; the message names the base and the reason, in one line.
    """
    try:
        path = locate_base(path if path.name else path.resolve())
        weights = open_weights(path)
        tokenizer = tokenizer_of_gguf(gguf_metadata(path)) if path.is_file() else tokenizer_of_folder(path)
        return Base(path, weights, tokenizer.fitted(weights.config.vocabulary))
    except OSError as error:
        raise ExportError(f"base '{path}' cannot be read: {error.strerror or error}; check it, or copy it") from error
    except ExportError as error:  # damaged names may hold line breaks
        text = " ".join(str(error).split())
        raise ExportError(text if path.name in text else f"base '{path.name}': {text}") from error


def gguf_metadata(path: Path) -> Mapping[str, Any]:
    """Metadata of a GGUF model; of its first shard, where it is split."""
    return read_shards(path)[0].metadata


def weights_digest(path: Path) -> str:
    """sha256 that identifies a base: of its GGUF file, or of the digests of its GGUF shards or weight files."""
    try:
        paths = [shard.path for shard in read_shards(path)] if path.is_file() else weight_files(path)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    digests = [sha256_of(p) for p in paths]
    return digests[0] if path.is_file() and len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def locate_base(path: Path) -> Path:
    """The base at `path`: a folder with config.json, a GGUF file, or the GGUF file (first shard) that a folder holds.

    Raises:
        ExportError: there is no base.
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
