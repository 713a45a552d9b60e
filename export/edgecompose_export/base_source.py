"""A base on disk, opened: where it lies, its weights and its tokenizer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

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
        ExportError: no base, or one that cannot be exported; what is missing is named.
    """
    path = locate_base(path)
    weights = open_weights(path)
    tokenizer = tokenizer_of_gguf(gguf_metadata(path)) if path.is_file() else tokenizer_of_folder(path)
    return Base(path, weights, tokenizer.fitted(weights.config.vocabulary))
