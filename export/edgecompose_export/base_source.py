"""A base on disk, opened: where it lies, its weights and its tokenizer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from edgecompose.errors import ExportError
from edgecompose_export.base_tokenizer import BaseTokenizer, tokenizer_of_folder, tokenizer_of_gguf
from edgecompose_export.weight_source import WeightSource, gguf_metadata, locate_base, open_weights, weights_digest


@dataclass(frozen=True)
class Base:
    """A Hugging Face folder or a GGUF file (the first of its shards)."""

    path: Path
    weights: WeightSource
    tokenizer: BaseTokenizer

    @functools.cached_property
    def identity(self) -> str:
        """sha256 that names the base (`weight_source.weights_digest`); all its bytes are read."""
        return weights_digest(self.path)


def open_base(path: Path) -> Base:
    """Open a Hugging Face folder, a GGUF file (any shard of it), or a folder that holds one GGUF model.

    Nothing but headers and the tokenizer is read.

    Raises:
        ExportError: no base, or one that cannot be exported; base and what is missing are named, in one line.
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
