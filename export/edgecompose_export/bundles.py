"""Builds bundles from recipes.

A bundle appears in one rename, and takes the place of an older one (--force) in one step (`bundle.atomic`).
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgecompose.bundle.atomic import new_folder
from edgecompose.bundle.files import Bundle, describe_file, write_manifest
from edgecompose.bundle.manifest import MANIFEST_FILE, Defaults, Manifest
from edgecompose.bundle.records import read_document
from edgecompose.bundle.specs import AdapterSpec, BaseSpec, EmbedderSpec, IndexSpec, TaskSpec
from edgecompose.errors import ExportError
from edgecompose.retrieval.examples import read_examples
from edgecompose.retrieval.index import open_index
from edgecompose.tasks import index_file_name, measure_similarities, pairwise_inner_products, place_adapter
from edgecompose_export import __version__
from edgecompose_export.base.spec import read_base_spec
from edgecompose_export.embedder import open_embedder, read_embedder_spec
from edgecompose_export.examples import INDEX_FILE, TABLE_FILE, ExampleTable, read_example_table, write_examples
from edgecompose_export.recipe import Recipe, read_recipe
from edgecompose_export.validation_gate import read_validation

Advance = Callable[[str], None]
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
        InUse: another process is making or changing the bundle.
        OSError: something cannot be read or written; an older bundle stays.
    """
    recipe, root = read_recipe(recipe_path), recipe_path.parent
    with new_folder(output, replace=force) as work:
        _refuse_taken(output, force=force)
        advance("copying base and embedder")
        spec = _copy_base(base or root / recipe.base, work)
        embedder = _copy_embedder(root / recipe.embedder, work)
        defaults = _defaults(recipe, recipe_path, spec, advance)
        advance("adapters")
        adapters = _place_adapters(recipe, root, work, spec)
        inner = pairwise_inner_products({n: work / a.file for n, a in adapters.items()}, spec, known={})
        advance("examples")
        table = _place_examples(recipe, root, work)
        index, tasks = _take_index(work, table, recipe, embedder)
        tasks = measure_similarities(work / index.file, index, tasks)
        advance("hashing")
        files = {p.relative_to(work).as_posix(): describe_file(p) for p in sorted(work.rglob("*")) if p.is_file()}
        manifest = Manifest(
            name=recipe.name,
            base=spec,
            embedder=embedder,
            index=index,
            tasks=tasks,
            adapters=adapters,
            defaults=defaults,
            files=files,
            inner_products=inner,
            created_by=_CREATED_BY,
        )
        write_manifest(work, manifest)
        Bundle(work)
    return manifest


def _refuse_taken(output: Path, *, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise ExportError(f"'{output}' exists; give --force to replace it, or another directory")
    if not output.is_dir():
        raise ExportError(f"'{output}' is a file; give a directory")
    if any(output.iterdir()) and not (output / MANIFEST_FILE).is_file():
        raise ExportError(f"'{output}' is not a bundle and is not empty, so it is not replaced")


def _defaults(recipe: Recipe, path: Path, base: BaseSpec, advance: Advance) -> Defaults:
    """The recipe's defaults; a base without a chat template takes raw prompts, which `advance` reports.

    Raises:
        ExportError: the recipe says prompt_form = "chat", and the base has no chat template.
    """
    if base.chat_template is not None or recipe.defaults.prompt_form == "raw":
        return recipe.defaults
    if "prompt_form" in tomllib.loads(read_document(path)).get("defaults", {}):
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

    fusing = spec.fusing
    if fusing is not None:
        fusing = replace(
            fusing,
            fuse_graph=place(fusing.fuse_graph),
            decoder_graph=place(fusing.decoder_graph),
            cuda_decoder_graph=place_optional(fusing.cuda_decoder_graph),
        )
    return replace(
        spec,
        graph=place(spec.graph),
        tokenizer=place(spec.tokenizer),
        fusing=fusing,
        chat_template=place_optional(spec.chat_template),
        cuda_graph=place_optional(spec.cuda_graph),
        kv_graphs={name: replace(kv, graph=place(kv.graph)) for name, kv in spec.kv_graphs.items()},
    )


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


def _place_adapters(recipe: Recipe, root: Path, work: Path, base: BaseSpec) -> dict[str, AdapterSpec]:
    """The adapter of each task, with its measured gain where the recipe names a validation."""
    adapters = {
        name: place_adapter(root / task.adapter, work, name=name, base=base, bits=recipe.bits)
        for name, task in recipe.tasks.items()
    }
    if recipe.validation is None:
        return adapters
    gains = read_validation(root / recipe.validation)
    return {name: replace(adapter, validation=gains.get(name)) for name, adapter in adapters.items()}


def _place_examples(recipe: Recipe, root: Path, work: Path) -> ExampleTable:
    """The index of the recipe's tasks: prebuilt, or embedded now."""
    new = {n: read_examples(root / t.examples) for n, t in recipe.tasks.items() if t.examples is not None}
    if recipe.examples is None:
        without = sorted(set(recipe.tasks) - set(new))
        if without:
            raise ExportError(
                f"tasks without examples: {', '.join(without)}; give `examples` for each or for the recipe"
            )
        embedder, spec = open_embedder(root / recipe.embedder)
        return write_examples(new, embedder, spec, work, keep_text=recipe.keep_text)
    if new:
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
    expected = embedder.space
    if table.index.embedder != expected:
        raise ExportError(
            f"the examples were embedded by {table.index.embedder}, the bundle's embedder is {expected}; "
            "index them again with this embedder"
        )
    extra = sorted(set(table.tasks) - set(recipe.tasks))
    if extra:
        raise ExportError(f"the examples hold tasks that the recipe lacks: {', '.join(extra)}; index without them")
    (work / TABLE_FILE).unlink(missing_ok=True)
    file = index_file_name(work / INDEX_FILE)
    (work / INDEX_FILE).rename(work / file)
    tasks = {
        name: TaskSpec(_mapping(recipe, name), span.first_key, span.examples) for name, span in table.tasks.items()
    }
    return replace(table.index, file=file), tasks


def _mapping(recipe: Recipe, name: str) -> dict[str, float]:
    """Weights of the adapters that a task is mapped to; its own where the recipe names none."""
    adapters = recipe.tasks[name].adapters
    return {name: 1.0} if adapters is None else dict(adapters)
