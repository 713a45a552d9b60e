"""Training examples of tasks: JSON lines, and their prompts as vectors under consecutive keys of an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.jsonl import read_lines
from edgecompose.errors import ExportError, RetrievalError
from edgecompose.guard.native import native
from edgecompose.retrieval.embedder import Embedder, normalize

if TYPE_CHECKING:
    from usearch.index import Index

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Example:
    """One line of a task file: a prompt, its expected answer, and the choices if there are any."""

    prompt: str
    answer: str
    choices: tuple[str, ...] | None = None


def read_examples(path: Path, *, limit: int | None = None) -> list[Example]:
    """Examples of a JSONL file whose lines have `prompt`, `answer` and optionally `choices`.

    Args:
        path: the file, UTF-8, one JSON object a line; blank lines are skipped.
        limit: read at most this many.

    Raises:
        ExportError: no file, no example, or a line in another format; the message names the line.
    """
    try:
        examples = [_example(fields, place) for place, fields in read_lines(path, ExportError)]
    except OSError as error:
        raise ExportError(f"examples '{path}' cannot be read: {error}; give a UTF-8 JSONL file") from error
    if not examples:
        raise ExportError(f"examples '{path}' holds no example; expected one JSON object a line")
    return examples[:limit]


def embed_prompts(
    embedder: Embedder, prompts: Sequence[str], advance: Callable[[int], None] = lambda count: None
) -> Float:
    """Vectors (n, dimension) of prompts, at unit norm as queries are, whether the encoder normalises or not."""
    vectors = []
    for prompt in prompts:
        vectors.append(normalize(embedder.embed(prompt)))
        advance(1)
    return np.stack(vectors)


def add_vectors(index: Index, vectors: Float, first_key: int) -> None:
    """Add vectors (n, dimension of the index) under consecutive keys (one thread: same input, same file).

    Raises:
        RetrievalError: the index has such a key, or memory ran out.
    """
    with native(RetrievalError, "vectors cannot be added to the index"):
        index.add(np.arange(first_key, first_key + len(vectors), dtype=np.uint64), vectors, threads=1)


def text_lines(examples: Iterable[Example], first_key: int) -> str:
    """JSON lines of key, prompt and answer."""
    rows = ({"key": k, "prompt": e.prompt, "answer": e.answer} for k, e in enumerate(examples, start=first_key))
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _example(fields: Any, place: str) -> Example:
    if not isinstance(fields, dict):
        raise ExportError(f"{place} is a {type(fields).__name__}, expected a JSON object")
    for key in ("prompt", "answer"):
        if not isinstance(fields.get(key), str) or not fields[key].strip():
            raise ExportError(f"{place} has no '{key}', expected a non-empty string")
    choices = fields.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(c, str) for c in choices)):
        raise ExportError(f"{place}: 'choices' is {choices!r:.40}, expected null or a list of strings")
    return Example(fields["prompt"], fields["answer"], None if choices is None else tuple(choices))
