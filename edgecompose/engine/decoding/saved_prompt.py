"""Prompts that were read, as arrays on the host and as a file, so that another process needs not read them again.

File: safetensors. Prompt n has the tensors `n.tokens` (length,) int32, `n.cache` (2 * layers, kv_heads, length, width),
keys and values in turn, and `n.logits` (vocabulary,) float32, those after its last token, where these are known. The
metadata name the format, what the prompts were computed with (`identity`), the blend of each, and a checksum of each.
Whoever can write the file can change what the model seems to have read: it is as private, and as trusted, as a bundle.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.atomic import replaced_file
from edgecompose.bundle.records import value_from_json
from edgecompose.errors import GenerationError
from edgecompose.guard.filesystem import read_plain
from edgecompose.guard.tensors import Tensors, tensors_of

Float = npt.NDArray[np.float32]
FORMAT = "edgecompose-prompts/1"
#: Bytes of a file's header for each prompt, at most, beside its tensors.
_HEADER = 1024


@dataclass(frozen=True, slots=True, eq=False)
class SavedPrompt:
    """A prompt that was read under a blend.

    Attributes:
        composition: the content hash of the blend.
        tokens: its token ids.
        cache: (2 * layers, kv_heads, len(tokens), width), keys and values in turn, in the element type of the KV cache.
        logits: (vocabulary,), those after the last token; None where only whole passes were read.
    """

    composition: str
    tokens: Sequence[int]
    cache: npt.NDArray[Any]
    logits: Float | None

    @property
    def bytes(self) -> int:
        """Size in a file, at most."""
        return self.cache.nbytes + 4 * len(self.tokens) + (0 if self.logits is None else self.logits.nbytes) + _HEADER


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What prompts are read with, and what their caches are like.

    Attributes:
        identity: names all that keys and values depend on, the blend apart.
        pass_tokens: tokens of a whole pass.
    """

    identity: str
    layers: int
    heads: int
    width: int
    dtype: type[np.generic]
    vocabulary: int
    pass_tokens: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the metadata say of a prompt."""

    composition: str
    checksum: int


def write_prompts(path: Path, prompts: Sequence[SavedPrompt], layout: CacheLayout) -> None:
    """Write prompts to a file in one rename; the last of several writers wins.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    from safetensors.numpy import save  # only writers need it

    tensors: Tensors = {}
    entries = []
    for number, prompt in enumerate(prompts):
        parts = {"tokens": np.asarray(prompt.tokens, np.int32), "cache": np.ascontiguousarray(prompt.cache)}
        if prompt.logits is not None:
            parts["logits"] = np.ascontiguousarray(prompt.logits)
        tensors |= {f"{number}.{name}": values for name, values in parts.items()}
        entries.append({"composition": prompt.composition, "checksum": _checksum(parts)})
    metadata = {"format": FORMAT, "identity": layout.identity, "prompts": json.dumps(entries)}
    with replaced_file(path) as work:
        work.write_bytes(save(tensors, metadata))


def read_prompts(path: Path, layout: CacheLayout, *, limit: int) -> list[SavedPrompt] | None:
    """The prompts of a file, views of its bytes; None where they were computed with something else.

    Args:
        limit: bytes of the largest file that is read.

    Raises:
        GenerationError: it cannot be read, is larger, or is no such file, or a damaged one.
    """
    what = f"prompt cache '{path}'"
    try:
        content = read_plain(path, limit)
    except OSError as error:
        raise GenerationError(f"{what} cannot be read: {error!s:.300}; remove it, or give another file") from error
    if len(content) > limit:
        raise GenerationError(f"{what} is larger than {limit} bytes; remove it, or raise --prompt-cache-bytes")
    try:
        tensors, metadata = tensors_of(content, what, GenerationError)
        if metadata.get("format", "").partition("/")[0] != FORMAT.partition("/")[0]:
            raise GenerationError("it has another format")
        if metadata["format"] != FORMAT or metadata.get("identity") != layout.identity:
            return None
        entries = value_from_json(
            tuple[_Entry, ...], json.loads(metadata.get("prompts", "")), "prompts", GenerationError
        )
        prompts = [_prompt_of(tensors, number, entry, layout) for number, entry in enumerate(entries)]
        if tensors:
            raise GenerationError("it has tensors of no prompt")
    except (GenerationError, ValueError, RecursionError) as error:
        raise GenerationError(
            f"{what} is damaged, or no such file: {error!s:.300}; remove it, or give another file"
        ) from error
    return prompts


def _prompt_of(tensors: Tensors, number: int, entry: _Entry, layout: CacheLayout) -> SavedPrompt:
    """Takes one prompt out of the tensors of a file.

    Raises:
        GenerationError: it is not what `write_prompts` writes.
    """
    names = ("tokens", "cache", "logits")
    parts = {name: tensors.pop(f"{number}.{name}") for name in names if f"{number}.{name}" in tensors}
    tokens, cache, logits = (parts.get(name) for name in names)
    if tokens is None or cache is None or tokens.dtype != np.int32 or tokens.ndim != 1 or not tokens.size:
        raise GenerationError(f"prompt {number} has no tokens, or no cache")
    if cache.dtype != layout.dtype or cache.shape != (2 * layout.layers, layout.heads, len(tokens), layout.width):
        raise GenerationError(f"prompt {number} has a cache {cache.dtype} {cache.shape}")
    if logits is not None and (logits.dtype != np.float32 or logits.shape != (layout.vocabulary,)):
        raise GenerationError(f"prompt {number} has logits {logits.dtype} {logits.shape}")
    if tokens.min() < 0 or tokens.max() >= layout.vocabulary or entry.checksum != _checksum(parts):
        raise GenerationError(f"prompt {number} is damaged")
    return SavedPrompt(entry.composition, tokens.tolist(), cache, logits)


def _checksum(parts: Tensors) -> int:
    """CRC-32 over the bytes of a prompt's tensors, each after its name."""
    checksum = 0
    for name, values in sorted(parts.items()):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, checksum)
    return checksum
