"""Adds tasks to a bundle, and removes them.

A task comes and goes in one rename, under the bundle's lock. Files whose content changes get a new name (the index
carries a part of its hash), the manifest is replaced last, and only then are the files removed that only the old one
named. A run that is killed at any moment leaves the old bundle or the new one, and at worst files that nothing names,
which the next change removes.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgecompose.adapters import convert_adapter
from edgecompose.bundle.adapter import adapter_metadata, load_adapter
from edgecompose.bundle.atomic import place, remove_leftovers, undo_unfinished, work_folder
from edgecompose.bundle.files import Bundle, describe_file, read_manifest, sha256_of, write_manifest
from edgecompose.bundle.lock import lock
from edgecompose.bundle.manifest import Manifest, check_name
from edgecompose.bundle.quantization import Bits
from edgecompose.bundle.specs import AdapterSpec, BaseSpec, IndexSpec, TaskSpec
from edgecompose.engine.device import choose_device
from edgecompose.errors import BundleError, ExportError, UnknownAdapter
from edgecompose.formats.registry import detect_format, unknown_format
from edgecompose.guard.filesystem import naming
from edgecompose.merging.merger import Merger
from edgecompose.retrieval.examples import add_vectors, embed_prompts, read_examples, text_lines
from edgecompose.retrieval.index import new_index, open_index, save_index, vectors_of
from edgecompose.retrieval.resemblance import typical_similarities
from edgecompose.retrieval.retriever import Retriever
from edgecompose.retrieval.whitening import load_whitening

if TYPE_CHECKING:
    from usearch.index import Index

#: Files that older versions left where they were killed, beside those that `place` notes.
_LEFT_FILES = re.compile(r"examples-[0-9a-f]{12}\.(usearch|jsonl)|\.examples\.usearch\.tmp")
#: Adapters whose inner products with one other are computed at once.
_PAIRED = 8


def add_task(
    root: Path,
    name: str,
    adapter: Path,
    examples: Path,
    *,
    bits: Bits = 4,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> Manifest:
    """Add a task with its adapter and examples to an existing bundle.

    Args:
        adapter: a quantised adapter file, or a file or folder in a format of `edgecompose.formats.registry`.
        examples: JSON lines with `prompt` and `answer`; prompts are embedded, and the texts kept where the bundle keeps
            those of its other tasks.
        bits: of the quantised factors, where `adapter` has another format.
        advance: called with (prompts embedded, prompts in all).

    Raises:
        ExportError: the task is there already, or the examples cannot be used.
        InUse: another process is changing the bundle.
        OSError: something cannot be written; the bundle is as it was.
        AdapterError: the adapter cannot be read, or does not fit the base.
        BundleError: the bundle cannot be used.
    """
    check_name(name)
    with _changing(root) as (bundle, work):
        manifest = bundle.manifest
        if name in manifest.tasks or name in manifest.adapters:
            raise ExportError(f"bundle '{root}' already has a task '{name}'; remove it first, or give another name")
        if f"adapters/{name}.safetensors" in manifest.files:
            raise ExportError(f"bundle '{root}' has an adapter of another name in that of '{name}'; give another name")
        added = read_examples(examples)
        prompts = [example.prompt for example in added]
        spec = place_adapter(adapter, work, name=name, base=manifest.base, bits=bits)
        index = open_index(bundle.path(manifest.index.file), manifest.index, editable=True)
        first_key = max((task.first_key + task.examples for task in manifest.tasks.values()), default=0)
        add_vectors(index, _vectors(bundle, prompts, advance), first_key)
        texts = None
        if manifest.index.texts is not None:
            texts = bundle.text(manifest.index.texts) + text_lines(added, first_key)
        task = TaskSpec({name: 1.0}, first_key, len(prompts))
        tasks = {**manifest.tasks, name: task}
        task = replace(task, similarity=typical_similarities(index, tasks).get(name))
        return _commit(
            bundle,
            work,
            index,
            texts,
            tasks={**tasks, name: task},
            adapters={**manifest.adapters, name: spec},
        )


def remove_task(root: Path, name: str) -> Manifest:
    """Remove a task, its examples, and its adapter unless another task uses it.

    Raises:
        UnknownAdapter: the bundle has no such task.
        ExportError: it is the only task.
        InUse: another process is changing the bundle.
        OSError: something cannot be written; the bundle is as it was.
        BundleError: the bundle cannot be used.
    """
    with _changing(root) as (bundle, work):
        manifest = bundle.manifest
        if name not in manifest.tasks:
            raise UnknownAdapter(f"bundle '{root}' has no task '{name}'; it has: {', '.join(sorted(manifest.tasks))}")
        if len(manifest.tasks) == 1:
            raise ExportError(f"'{name}' is the only task of bundle '{root}'; a bundle needs one")
        tasks = {key: task for key, task in manifest.tasks.items() if key != name}
        old = open_index(bundle.path(manifest.index.file), manifest.index, editable=True)
        index = new_index(manifest.index.dimension, manifest.index.dtype, vectors=manifest.index.vectors)
        for task in tasks.values():
            keys = np.arange(task.first_key, task.first_key + task.examples, dtype=np.uint64)
            index.add(keys, vectors_of(old, keys), threads=1)
        texts = None
        if manifest.index.texts is not None:
            lines = bundle.text(manifest.index.texts).split("\n")[:-1]  # JSON may hold other line separators
            texts = "".join(f"{line}\n" for line in lines if not _is_of(line, manifest.tasks[name]))
        used = set().union(*(task.adapters for task in tasks.values()))
        adapters = {key: spec for key, spec in manifest.adapters.items() if key in used}
        return _commit(bundle, work, index, texts, tasks=tasks, adapters=adapters)


def measure_tasks(root: Path) -> bool:
    """Measure the similarity that is typical of each task of a bundle where none was, as in bundles of older versions.

    Returns:
        Whether the manifest has changed; nothing else does.

    Raises:
        InUse: another process is changing the bundle.
        BundleError, RetrievalError: the bundle cannot be used.
        OSError: the manifest cannot be written; it is as it was.
    """
    with _changing(root) as (bundle, _):
        manifest, index = bundle.manifest, bundle.manifest.index
        if all(task.similarity is not None for task in manifest.tasks.values()):
            return False
        changed = replace(manifest, tasks=measure_similarities(bundle.path(index.file), index, manifest.tasks))
        if changed != manifest:
            write_manifest(root, changed)
        return changed != manifest


def place_adapter(source: Path, root: Path, *, name: str, base: BaseSpec, bits: Bits) -> AdapterSpec:
    """Copy a quantised adapter, or convert one of another format, to `adapters/NAME.safetensors` of a new bundle, or
    of the folder of what is new in one.

    Raises:
        AdapterError: it cannot be read, or does not fit the base.
        ExportError: nothing lies at `source`.
    """
    relative = f"adapters/{name}.safetensors"
    target = root / relative
    if detect_format(source) is not None:
        return replace(convert_adapter(source, base, target, bits=bits).spec, file=relative)
    if not source.is_file():
        raise ExportError(f"{unknown_format(source)}, or a quantised file")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    adapter = load_adapter(target, name, base.slots, base.identity)
    about = _source_of(target)
    errors = about.get("errors", {})
    error = float(np.mean(list(errors.values()))) if errors else 0.0
    return AdapterSpec(
        file=relative, rank=adapter.rank, bits=adapter.bits, base=base.identity, error=round(error, 5), source=about
    )


def pairwise_inner_products(
    adapters: Mapping[str, Path], base: BaseSpec, *, known: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Inner products of the updates of every two adapters, given by their files; those in `known` are not computed
    again.
    """
    names = sorted(adapters)
    result = {one: {other: known.get(one, {}).get(other) for other in names[i:]} for i, one in enumerate(names)}
    merger = Merger(choose_device("cpu"))
    load = functools.lru_cache(maxsize=2 * _PAIRED)(
        lambda name: load_adapter(adapters[name], name, base.slots, base.identity)
    )
    for one, row in result.items():
        missing = [other for other, value in row.items() if value is None]
        for start in range(0, len(missing), _PAIRED):
            others = [other for other in missing[start : start + _PAIRED] if other != one]
            products = merger.inner_products([load(one), *map(load, others)])[0]
            row.update({n: float(v) for n, v in zip([one, *others], products, strict=True) if row[n] is None})
    return {one: {other: value for other, value in row.items() if value is not None} for one, row in result.items()}


def measure_similarities(index: Path, spec: IndexSpec, tasks: Mapping[str, TaskSpec]) -> dict[str, TaskSpec]:
    """The tasks with the similarity that is typical among the examples of each."""
    typical = typical_similarities(open_index(index, spec, editable=True), tasks)
    return {name: replace(task, similarity=typical.get(name)) for name, task in tasks.items()}


def index_file_name(path: Path) -> str:
    """What an index file is called in a bundle: it carries a part of its hash."""
    return f"examples-{sha256_of(path)[:12]}.usearch"


def _vectors(bundle: Bundle, prompts: Sequence[str], advance: Callable[[int, int], None]) -> npt.NDArray[np.float32]:
    """Vectors (n, dimension of the index) of prompts."""
    done = iter(range(1, len(prompts) + 1))
    embedder = Retriever(bundle, choose_device("cpu")).embedder
    vectors = embed_prompts(embedder, prompts, lambda count: advance(next(done), len(prompts)))
    spec = bundle.manifest.index
    if spec.whitening is None:
        return vectors
    return load_whitening(bundle.path(spec.whitening), bundle.manifest.embedder.dimension, spec.dimension)(vectors)


def _source_of(path: Path) -> dict[str, Any]:
    """Where a quantised adapter comes from, as the file says."""
    source = json.loads(adapter_metadata(path).get("source", "{}"))
    return source if isinstance(source, dict) else {}


def _is_of(line: str, task: TaskSpec) -> bool:
    """Whether a line of the texts belongs to a task.

    Raises:
        BundleError: the line is no object with a key.
    """
    try:
        key = json.loads(line)["key"]
        return task.first_key <= int(key) < task.first_key + task.examples
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise BundleError(f"prompts of the bundle: {line!r:.80} is no object with a key; export it again") from error


@contextmanager
def _changing(root: Path) -> Iterator[tuple[Bundle, Path]]:
    """A bundle that no other process changes, without what ended writers left in it, and a folder for what is new.

    Raises:
        InUse: another process is changing the bundle.
        BundleError: the bundle cannot be used.
    """
    read_manifest(root)  # before anything is made beside what is no bundle
    with naming(root), lock(root) as held:
        if held:
            remove_leftovers(root.resolve())
            undo_unfinished(root, keep=lambda: set(read_manifest(root).files))
        bundle = Bundle(root)
        for path in root.iterdir() if held else ():
            if _LEFT_FILES.fullmatch(path.name) and path.name not in bundle.manifest.files:
                path.unlink(missing_ok=True)
        with work_folder(root, clean=held) as work:
            yield bundle, work


def _commit(
    bundle: Bundle,
    work: Path,
    index: Index,
    texts: str | None,
    *,
    tasks: Mapping[str, TaskSpec],
    adapters: Mapping[str, AdapterSpec],
) -> Manifest:
    """Write a changed index (and texts) under new names, and let the bundle have them with these tasks and adapters.

    Args:
        work: the folder of what is new, with the adapters that are.

    Raises:
        ExportError: another program has changed the bundle.
        OSError: something cannot be written; the bundle is as it was.
    """
    root, old = bundle.root, bundle.manifest
    save_index(index, work / "examples.usearch")
    file = index_file_name(work / "examples.usearch")
    (work / "examples.usearch").rename(work / file)
    texts_file = None
    if texts is not None:
        texts_file = f"{Path(file).stem}.jsonl"
        (work / texts_file).write_text(texts, encoding="utf-8")
    new = {p.relative_to(work).as_posix(): describe_file(p) for p in sorted(work.rglob("*")) if p.is_file()}
    unused = {old.index.file, old.index.texts}
    unused |= {spec.file for spec in old.adapters.values()} - {spec.file for spec in adapters.values()}
    stay = {path: entry for path, entry in old.files.items() if path not in unused}
    places = {n: (work if spec.file in new else root) / spec.file for n, spec in adapters.items()}
    changed = replace(
        old,
        tasks=dict(tasks),
        adapters=dict(adapters),
        inner_products=pairwise_inner_products(places, old.base, known=old.inner_products),
        index=replace(old.index, file=file, vectors=len(index), texts=texts_file),
        files={**stay, **new},
    )
    if bundle.changed:
        raise ExportError(f"bundle '{root}' was changed by another program meanwhile; run this again")
    place(
        work,
        root,
        retired=sorted(set(old.files) - set(changed.files)),
        keep=lambda: set(read_manifest(root).files),
        commit=lambda: write_manifest(root, changed),
    )
    return changed
