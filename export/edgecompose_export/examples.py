"""Training prompts to vectors in a USearch index, with the table of which keys belong to which task.

The folder holds `examples.usearch` and `examples.json`; prompts are kept (`examples.jsonl`) only on request.
A task's keys are consecutive: [first_key, first_key + examples).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from usearch.index import Index

from edgecompose.embedder import Embedder
from edgecompose.errors import ExportError
from edgecompose.manifest import EmbedderSpec, IndexSpec, check_name
from edgecompose.retrieval import new_index
from edgecompose.typed_json import value_from_json
from edgecompose_export.datasets import Example

INDEX_FILE, TABLE_FILE, TEXTS_FILE = "examples.usearch", "examples.json", "examples.jsonl"
INDEX_DTYPE: Literal["f16"] = "f16"


@dataclass(frozen=True, slots=True)
class KeySpan:
    """Keys [first_key, first_key + examples) of one task."""

    first_key: int
    examples: int


@dataclass(frozen=True, slots=True)
class ExampleTable:
    """`examples.json`: the index and the keys of each task."""

    index: IndexSpec
    tasks: dict[str, KeySpan]


def embedder_identity(spec: EmbedderSpec) -> str:
    """What vectors depend on: the encoder's weights, precision, pooling, window and normalisation."""
    return f"{spec.identity}/{spec.precision}/{spec.pooling}/{spec.max_length}/{'unit' if spec.normalize else 'free'}"


def write_examples(
    tasks: Mapping[str, Sequence[Example]],
    embedder: Embedder,
    spec: EmbedderSpec,
    output: Path,
    *,
    keep_text: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> ExampleTable:
    """Embed the prompts of every task and write the index.

    Args:
        tasks: examples by task name.
        keep_text: write the prompts too, for people who want to see what was retrieved.
        advance: called with the number of prompts embedded, as they are.

    Raises:
        ExportError: no task, or `output` already holds an index.
    """
    if not tasks:
        raise ExportError("no task was given; give at least one as NAME=FILE.jsonl")
    if (output / TABLE_FILE).exists():
        raise ExportError(f"'{output}' already holds examples; remove it or give another folder")
    index = new_index(spec.dimension, INDEX_DTYPE)
    spans: dict[str, KeySpan] = {}
    for name, examples in tasks.items():
        check_name(name)
        spans[name] = KeySpan(len(index), len(examples))
        add_prompts(index, embedder, [e.prompt for e in examples], len(index), advance)
    output.mkdir(parents=True, exist_ok=True)
    index.save(str(output / INDEX_FILE))
    texts = None
    if keep_text:
        texts = TEXTS_FILE
        prompts = [e.prompt for examples in tasks.values() for e in examples]
        (output / texts).write_text(prompt_lines(prompts, 0), encoding="utf-8")
    described = IndexSpec(INDEX_FILE, len(index), spec.dimension, embedder_identity(spec), INDEX_DTYPE, texts)
    table = ExampleTable(described, spans)
    (output / TABLE_FILE).write_text(json.dumps(dataclasses.asdict(table), indent=1) + "\n", encoding="utf-8")
    return table


def add_prompts(
    index: Index, embedder: Embedder, prompts: Sequence[str], first_key: int, advance: Callable[[int], None]
) -> None:
    """Embed prompts and add them under consecutive keys (one thread: the same input gives the same file)."""
    for key, prompt in enumerate(prompts, start=first_key):
        index.add(np.uint64(key), embedder.embed(prompt), threads=1)
        advance(1)


def prompt_lines(prompts: Sequence[str], first_key: int) -> str:
    """JSON lines of key and prompt."""
    lines = (json.dumps({"key": k, "prompt": p}, ensure_ascii=False) for k, p in enumerate(prompts, start=first_key))
    return "".join(f"{line}\n" for line in lines)


def read_example_table(folder: Path) -> ExampleTable:
    """`examples.json` of a folder that `write_examples` made."""
    path = folder / TABLE_FILE
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"'{folder}' has no readable {TABLE_FILE} ({error}); make it with 'edgecompose-export examples'"
        ) from error
    return value_from_json(ExampleTable, found, TABLE_FILE)
