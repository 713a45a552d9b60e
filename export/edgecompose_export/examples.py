"""Training prompts to vectors in a USearch index, with the table of which keys belong to which task.

The folder holds `examples.usearch`, `examples.json` and, where the vectors are whitened, `whitening.safetensors`;
prompts and answers are kept (`examples.jsonl`) only on request. A task's keys are consecutive:
[first_key, first_key + examples).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.atomic import new_files
from edgecompose.bundle.manifest import check_name
from edgecompose.bundle.records import read_json, value_from_json
from edgecompose.bundle.specs import EmbedderSpec, IndexSpec
from edgecompose.errors import ExportError
from edgecompose.retrieval.embedder import Embedder
from edgecompose.retrieval.examples import Example, add_vectors, embed_prompts, text_lines
from edgecompose.retrieval.index import new_index, save_index
from edgecompose.retrieval.whitening import Whitening, fit_whitening, save_whitening

Float = npt.NDArray[np.float32]

INDEX_FILE, TABLE_FILE, TEXTS_FILE = "examples.usearch", "examples.json", "examples.jsonl"
WHITENING_FILE = "whitening.safetensors"
#: Vectors that a whitening is fitted to, taken at even distances; more of them change nothing.
_FITTED = 50_000
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


def write_examples(
    tasks: Mapping[str, Sequence[Example]],
    embedder: Embedder,
    spec: EmbedderSpec,
    output: Path,
    *,
    whiten: bool = True,
    keep_text: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> ExampleTable:
    """Embed the prompts of every task and write the index.

    Args:
        tasks: examples by task name.
        whiten: search by a metric that is learned from these examples (`edgecompose.retrieval.whitening`), which
            needs two tasks.
        keep_text: write prompts and answers too, so that people can see what was retrieved, and answers that
            resemble them are written faster.
        advance: called with the number of prompts embedded, as they are.

    Raises:
        ExportError: no task, or `output` already holds an index.
        InUse: another process is writing to it.
        OSError: it cannot be written; nothing is there then.
    """
    if not tasks:
        raise ExportError("no task is named; give at least one as NAME=FILE.jsonl")
    with new_files(output, last=TABLE_FILE) as work:
        if (output / TABLE_FILE).exists():
            raise ExportError(f"'{output}' already holds examples; remove it or give another folder")
        return _write(tasks, embedder, spec, work, whiten=whiten, keep_text=keep_text, advance=advance)


def _write(
    tasks: Mapping[str, Sequence[Example]],
    embedder: Embedder,
    spec: EmbedderSpec,
    folder: Path,
    *,
    whiten: bool,
    keep_text: bool,
    advance: Callable[[int], None],
) -> ExampleTable:
    spans: dict[str, KeySpan] = {}
    labels: list[int] = []
    for number, (name, examples) in enumerate(tasks.items()):
        check_name(name)
        spans[name] = KeySpan(len(labels), len(examples))
        labels += [number] * len(examples)
    flat = [example for examples in tasks.values() for example in examples]
    prompts = [example.prompt for example in flat]
    vectors = embed_prompts(embedder, prompts, advance)
    whitening = _whitening_of(vectors, labels, spec) if whiten and len(tasks) > 1 else None
    dimension = spec.dimension if whitening is None else whitening.matrix.shape[1]
    index = new_index(dimension, INDEX_DTYPE, vectors=len(vectors))
    add_vectors(index, vectors if whitening is None else whitening(vectors), 0)
    described = IndexSpec(
        file=INDEX_FILE,
        vectors=len(index),
        dimension=dimension,
        embedder=spec.space,
        dtype=INDEX_DTYPE,
        texts=TEXTS_FILE if keep_text else None,
        whitening=None if whitening is None else WHITENING_FILE,
    )
    table = ExampleTable(described, spans)
    save_index(index, folder / INDEX_FILE)
    if whitening is not None:
        save_whitening(folder / WHITENING_FILE, whitening)
    if keep_text:
        (folder / TEXTS_FILE).write_text(text_lines(flat, 0), encoding="utf-8")
    (folder / TABLE_FILE).write_text(json.dumps(dataclasses.asdict(table), indent=1) + "\n", encoding="utf-8")
    return table


def _whitening_of(vectors: Float, labels: Sequence[int], spec: EmbedderSpec) -> Whitening:
    """A whitening of as many dimensions as the encoder is wide.

    The shrinkage gives the identity the weight of a quarter of an example a dimension: little data leaves the metric as
    it was.
    """
    count, width = vectors.shape
    step = -(-count // _FITTED)
    return fit_whitening(
        vectors[::step],
        labels[::step],
        shrinkage=width / (4 * count + width),
        dimension=width // 3 if spec.ends else width,
    )


def read_example_table(folder: Path) -> ExampleTable:
    """`examples.json` of a folder that `write_examples` made."""
    fields = read_json(folder / TABLE_FILE, ExportError, "make it with 'edgecompose-export examples'")
    return value_from_json(ExampleTable, fields, TABLE_FILE)
