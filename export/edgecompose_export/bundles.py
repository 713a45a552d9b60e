"""Writes bundles: from a recipe, and task by task on an existing one.

A bundle appears, or a task comes and goes, in one rename. Files whose content changes get a new name (the index
carries a piece of its hash), the manifest is replaced last, and only then are the files removed that only the old one
named: a run that is killed at any moment leaves the old bundle or the new one, and at worst files that nothing names.
Replacing a whole bundle (--force) takes two renames; killed between them, it leaves the old one as `.<name>.<pid>.old`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecompose.bundle.adapter import adapter_metadata, load_adapter
from edgecompose.bundle.atomic import new_folder
from edgecompose.bundle.files import Bundle, describe_file, sha256_of
from edgecompose.bundle.manifest import MANIFEST_FILE, Defaults, Manifest, check_name, manifest_to_json
from edgecompose.bundle.quantization import Bits
from edgecompose.bundle.specs import AdapterSpec, BaseSpec, EmbedderSpec, FileEntry, IndexSpec, TaskSpec
from edgecompose.engine.device import choose_device
from edgecompose.errors import ExportError, UnknownAdapter
from edgecompose.merging.merger import Merger
from edgecompose.retrieval.embedder import Embedder
from edgecompose.retrieval.index import new_index, open_index
from edgecompose.retrieval.whitening import load_whitening
from edgecompose_export import __version__
from edgecompose_export.adapters import export_adapter, source_kind
from edgecompose_export.base.spec import read_base_spec
from edgecompose_export.datasets import read_examples
from edgecompose_export.embedder import open_embedder, read_embedder_spec
from edgecompose_export.examples import (
    INDEX_FILE,
    TABLE_FILE,
    ExampleTable,
    add_vectors,
    embed_prompts,
    embedder_identity,
    prompt_lines,
    read_example_table,
    write_examples,
)
from edgecompose_export.recipe import Recipe, read_recipe
from edgecompose_export.validation_gate import read_validation

Advance = Callable[[str], None]
#: Adapters whose inner products with one other are computed at once.
_PAIRED = 8
_CREATED_BY = f"edgecompose-export {__version__}"


def build_bundle(
    recipe_path: Path,
    output: Path,
    *,
    base: Path | None = None,
    force: bool = False,
    advance: Advance = lambda step: None,
) -> Manifest:
    """Make the bundle that a recipe describes.

    Args:
        base: an exported base to take instead of the recipe's, such as the same model in another precision.
        force: replace a bundle that is already there.

    Raises:
        ExportError: `output` exists, or a part of the recipe cannot be used.
        AdapterError: an adapter does not fit the base.
    """
    recipe, root = read_recipe(recipe_path), recipe_path.parent
    if output.exists() and not force:
        raise ExportError(f"'{output}' exists; give --force to replace it, or another directory")
    if output.exists() and not output.is_dir():
        raise ExportError(f"'{output}' is a file; give a directory")
    if output.exists() and any(output.iterdir()) and not (output / MANIFEST_FILE).is_file():
        raise ExportError(f"'{output}' is not a bundle and is not empty, so it is not replaced")
    with new_folder(output, put=_replace_directory) as work:
        advance("copying base and embedder")
        spec = _copy_base(base or root / recipe.base, work)
        embedder = _copy_embedder(root / recipe.embedder, work)
        defaults = _defaults(recipe, recipe_path, spec, advance)
        advance("adapters")
        adapters = {
            name: _place_adapter(root / t.adapter, name, spec, work, recipe.bits) for name, t in recipe.tasks.items()
        }
        if recipe.validation is not None:
            gains = read_validation(root / recipe.validation)
            adapters = {name: replace(made, validation=gains.get(name)) for name, made in adapters.items()}
        inner = _inner_products(work, spec, adapters, {})
        advance("examples")
        table = _place_examples(recipe, root, work)
        index, tasks = _take_index(work, table, recipe, embedder)
        advance("hashing")
        files = {p.relative_to(work).as_posix(): describe_file(p) for p in sorted(work.rglob("*")) if p.is_file()}
        manifest = Manifest(
            name=recipe.name, base=spec, embedder=embedder, index=index, tasks=tasks, adapters=adapters,
            defaults=defaults, files=files, inner_products=inner, created_by=_CREATED_BY,
        )  # fmt: skip
        _write_manifest(work, manifest)
        Bundle(work)
    return manifest


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
        adapter: a quantised adapter file, or what `export_adapter` reads.
        examples: JSONL of prompts.
        advance: called with (prompts embedded, prompts in all).

    Raises:
        ExportError: the task is there already.
        AdapterError: the adapter does not fit the base.
    """
    bundle = Bundle(root)
    manifest = bundle.manifest
    check_name(name)
    if name in manifest.tasks or name in manifest.adapters:
        raise ExportError(f"bundle '{root}' already has a task '{name}'; remove it first, or give another name")
    prompts = [e.prompt for e in read_examples(examples)]
    spec = _place_adapter(adapter, name, manifest.base, root, bits)
    index = open_index(bundle.path(manifest.index.file), manifest.index, editable=True)
    first = max((t.first_key + t.examples for t in manifest.tasks.values()), default=0)
    done = iter(range(1, len(prompts) + 1))
    vectors = embed_prompts(_embedder_of(bundle), prompts, lambda count: advance(next(done), len(prompts)))
    known = manifest.index
    if known.whitening is not None:
        vectors = load_whitening(bundle.path(known.whitening), manifest.embedder.dimension, known.dimension)(vectors)
    add_vectors(index, vectors, first)
    texts = None
    if manifest.index.texts is not None:
        texts = bundle.text(manifest.index.texts) + prompt_lines(prompts, first)
    adapters = {**manifest.adapters, name: spec}
    changed = replace(
        manifest, tasks={**manifest.tasks, name: TaskSpec({name: 1.0}, first, len(prompts))}, adapters=adapters,
        inner_products=_inner_products(root, manifest.base, adapters, manifest.inner_products),
        **_store_index(root, index, manifest, texts, {spec.file: describe_file(root / spec.file)}),
    )  # fmt: skip
    _commit(root, manifest, changed)
    return changed


def remove_task(root: Path, name: str) -> Manifest:
    """Remove a task, its examples, and its adapter unless another task uses it."""
    bundle = Bundle(root)
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
        index.add(keys, np.asarray(old.get(keys), np.float32), threads=1)
    gone = manifest.tasks[name]
    texts = None
    if manifest.index.texts is not None:
        lines = bundle.text(manifest.index.texts).split("\n")[:-1]  # JSON may hold other line separators
        texts = "".join(f"{line}\n" for line in lines if not _key_in(line, gone))
    used = set().union(*(task.adapters for task in tasks.values()))
    adapters = {key: spec for key, spec in manifest.adapters.items() if key in used}
    inner = _inner_products(root, manifest.base, adapters, manifest.inner_products)
    changed = replace(
        manifest, tasks=tasks, adapters=adapters, inner_products=inner, **_store_index(root, index, manifest, texts, {})
    )
    named = set(changed.named_files())
    named |= {f"{path}.data" for path in named}
    changed = replace(changed, files={path: entry for path, entry in changed.files.items() if path in named})
    _commit(root, manifest, changed)
    return changed


def _defaults(recipe: Recipe, path: Path, base: BaseSpec, advance: Advance) -> Defaults:
    """The recipe's defaults; a base without a chat template takes raw prompts, and `advance` is told so.

    Raises:
        ExportError: the recipe says prompt_form = "chat", and the base has no chat template.
    """
    if base.chat_template is not None or recipe.defaults.prompt_form == "raw":
        return recipe.defaults
    if "prompt_form" in tomllib.loads(path.read_text(encoding="utf-8-sig")).get("defaults", {}):
        raise ExportError(
            f"recipe '{path}' says prompt_form = \"chat\", but base '{base.source}' has no chat template; say "
            'prompt_form = "raw", or export the base with a chat template'
        )
    advance("the base has no chat template: prompts are sent raw")
    return replace(recipe.defaults, prompt_form="raw")


def _copy_base(folder: Path, work: Path) -> BaseSpec:
    spec = read_base_spec(folder)
    _copy(folder / f"{spec.graph}.data", work / "base" / f"{spec.graph}.data")  # all graphs read it, beside them

    def place(name: str) -> str:
        _copy(folder / name, work / "base" / name)
        return f"base/{name}"

    def place_optional(name: str | None) -> str | None:
        return None if name is None else place(name)

    folding = spec.fusing
    if folding is not None:
        folding = replace(
            folding, fuse_graph=place(folding.fuse_graph), decoder_graph=place(folding.decoder_graph),
            cuda_decoder_graph=place_optional(folding.cuda_decoder_graph),
        )  # fmt: skip
    return replace(
        spec, graph=place(spec.graph), tokenizer=place(spec.tokenizer), fusing=folding,
        chat_template=place_optional(spec.chat_template), cuda_graph=place_optional(spec.cuda_graph),
    )  # fmt: skip


def _copy_embedder(folder: Path, work: Path) -> EmbedderSpec:
    spec = read_embedder_spec(folder)
    for name in (spec.graph, f"{spec.graph}.data", spec.tokenizer):
        _copy(folder / name, work / "embedder" / name)
    return replace(spec, graph=f"embedder/{spec.graph}", tokenizer=f"embedder/{spec.tokenizer}")


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ExportError(f"'{source}' is missing; export it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _place_adapter(source: Path, name: str, base: BaseSpec, root: Path, bits: Bits) -> AdapterSpec:
    """Copy a quantised adapter, or export one of another kind, into `adapters/`; check that it fits."""
    relative = f"adapters/{name}.safetensors"
    target = root / relative
    if source_kind(source) is not None:
        target.unlink(missing_ok=True)
        spec = export_adapter(source, base, target, bits).spec
        return replace(spec, file=relative)
    if not source.is_file():
        raise ExportError(
            f"adapter '{source}' is neither a PEFT folder nor an mlx_lm folder, a GGUF LoRA file or a quantised file"
        )
    _copy(source, target)
    try:
        adapter = load_adapter(target, name, base.slots, base.identity)
    except Exception:
        target.unlink()
        raise
    described = _source_of(target)
    errors = described.get("errors", {})
    error = float(np.mean(list(errors.values()))) if errors else 0.0
    return AdapterSpec(relative, adapter.rank, adapter.bits, base.identity, round(error, 5), described)


def _inner_products(
    root: Path, base: BaseSpec, adapters: Mapping[str, AdapterSpec], known: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Inner products of every pair of adapters, those that are known taken over."""
    names = sorted(adapters)
    result = {one: {other: known.get(one, {}).get(other) for other in names[i:]} for i, one in enumerate(names)}
    merger = Merger(choose_device("cpu"))
    read = functools.lru_cache(maxsize=2 * _PAIRED)(
        lambda name: load_adapter(root / adapters[name].file, name, base.slots, base.identity)
    )
    for one, row in result.items():
        missing = [other for other, value in row.items() if value is None]
        for start in range(0, len(missing), _PAIRED):
            others = [other for other in missing[start : start + _PAIRED] if other != one]
            products = merger.inner_products([read(one), *map(read, others)])[0]
            row.update({n: float(v) for n, v in zip([one, *others], products, strict=True) if row[n] is None})
    return {one: {other: value for other, value in row.items() if value is not None} for one, row in result.items()}


def _source_of(path: Path) -> dict[str, Any]:
    found = json.loads(adapter_metadata(path).get("source", "{}"))
    return found if isinstance(found, dict) else {}


def _place_examples(recipe: Recipe, root: Path, work: Path) -> ExampleTable:
    """The index of the recipe's tasks: prebuilt, or embedded now."""
    fresh = {n: read_examples(root / t.examples) for n, t in recipe.tasks.items() if t.examples is not None}
    if recipe.examples is None:
        without = sorted(set(recipe.tasks) - set(fresh))
        if without:
            raise ExportError(
                f"tasks without examples: {', '.join(without)}; give `examples` for each or for the recipe"
            )
        embedder, spec = open_embedder(root / recipe.embedder)
        return write_examples(fresh, embedder, spec, work, keep_text=recipe.keep_text)
    if fresh:
        raise ExportError("the recipe names examples both for itself and for tasks; index all of them in one folder")
    folder = root / recipe.examples
    table = read_example_table(folder)
    missing = sorted(set(recipe.tasks) - set(table.tasks))
    if missing:
        raise ExportError(f"'{folder}' has no examples of: {', '.join(missing)}")
    _copy(folder / table.index.file, work / INDEX_FILE)
    for optional in (table.index.texts, table.index.whitening):
        if optional is not None:
            _copy(folder / optional, work / optional)
    open_index(work / INDEX_FILE, table.index)
    return table


def _take_index(
    work: Path, table: ExampleTable, recipe: Recipe, embedder: EmbedderSpec
) -> tuple[IndexSpec, dict[str, TaskSpec]]:
    """Check that the index is of this embedder and these tasks, and name it after its content."""
    wanted = embedder_identity(embedder)
    if table.index.embedder != wanted:
        raise ExportError(
            f"the examples were embedded by {table.index.embedder}, the bundle's embedder is {wanted}; "
            "index them again with this embedder"
        )
    extra = sorted(set(table.tasks) - set(recipe.tasks))
    if extra:
        raise ExportError(f"the examples hold tasks that the recipe lacks: {', '.join(extra)}; index without them")
    (work / TABLE_FILE).unlink(missing_ok=True)
    file = _index_name(work / INDEX_FILE)
    (work / INDEX_FILE).rename(work / file)
    tasks = {
        name: TaskSpec(_servants(recipe, name), span.first_key, span.examples) for name, span in table.tasks.items()
    }
    return replace(table.index, file=file), tasks


def _servants(recipe: Recipe, name: str) -> dict[str, float]:
    served_by = recipe.tasks[name].adapters
    return {name: 1.0} if served_by is None else dict(served_by)


def _index_name(path: Path) -> str:
    return f"examples-{sha256_of(path)[:12]}.usearch"


def _embedder_of(bundle: Bundle) -> Embedder:
    spec = bundle.manifest.embedder
    return Embedder(bundle.path(spec.graph), bundle.path(spec.tokenizer), spec, choose_device("cpu"))


def _store_index(
    root: Path, index: Any, manifest: Manifest, texts: str | None, files: Mapping[str, FileEntry]
) -> dict[str, Any]:
    """Write a changed index (and texts) under new names; return the manifest's changed fields."""
    temporary = root / f".{INDEX_FILE}.tmp"
    index.save(str(temporary))
    name = _index_name(temporary)
    temporary.replace(root / name)
    entries = {k: v for k, v in manifest.files.items() if k not in (manifest.index.file, manifest.index.texts)}
    entries |= {**files, name: describe_file(root / name)}
    texts_name = None
    if texts is not None:
        texts_name = f"{Path(name).stem}.jsonl"
        (root / texts_name).write_text(texts, encoding="utf-8")
        entries[texts_name] = describe_file(root / texts_name)
    spec = replace(manifest.index, file=name, vectors=len(index), texts=texts_name)
    return {"index": spec, "files": entries}


def _key_in(line: str, task: TaskSpec) -> bool:
    return task.first_key <= int(json.loads(line)["key"]) < task.first_key + task.examples


def _write_manifest(root: Path, manifest: Manifest) -> None:
    """Replace the manifest in one rename, everything before it being on disk."""
    for relative in manifest.files:
        _sync(root / relative)
    temporary = root / f".{MANIFEST_FILE}.tmp"
    temporary.write_text(manifest_to_json(manifest), encoding="utf-8")
    _sync(temporary)
    temporary.replace(root / MANIFEST_FILE)
    _sync(root)


def _commit(root: Path, old: Manifest, new: Manifest) -> None:
    """Make a changed manifest the bundle's, then remove the files that only the old one named."""
    _write_manifest(root, new)
    for relative in set(old.files) - set(new.files):
        (root / relative).unlink(missing_ok=True)


def _replace_directory(work: Path, output: Path) -> None:
    """Put `work` in the place of `output`, which is brought back when that fails."""
    if output.exists():
        old = output.with_name(f".{output.name}.{os.getpid()}.old")
        output.rename(old)
        try:
            work.rename(output)
        except BaseException:
            old.rename(output)
            raise
        shutil.rmtree(old)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        work.rename(output)
    _sync(output.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
