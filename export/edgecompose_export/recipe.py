"""The recipe of a bundle, a TOML file, as frozen values; knows nothing of what it names."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from edgecompose.bundle.manifest import Defaults, check_name
from edgecompose.bundle.quantization import Bits
from edgecompose.bundle.records import value_from_json
from edgecompose.composer import merge_settings
from edgecompose.errors import ExportError, ManifestInvalid, MergeError


@dataclass(frozen=True, slots=True)
class RecipeTask:
    """One task of a recipe: an adapter (quantised file or PEFT folder) and, unless indexed already, its examples.

    `served_by` are the weights of the recipe's adapters (by task) that answer for it, by default its own at 1: another
    task's adapter, or a blend, may do better on its validation examples.
    """

    adapter: str
    examples: str | None = None
    served_by: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe file; paths are relative to it. `examples` is a folder made by `edgecompose-export examples`.

    `admission` is the JSON of `edgecompose eval --methods base,own --json` on validation examples, which says what each
    adapter is worth.
    """

    name: str
    base: str
    embedder: str
    tasks: dict[str, RecipeTask]
    examples: str | None = None
    admission: str | None = None
    bits: Bits = 4
    keep_text: bool = False
    defaults: Defaults = Defaults()


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        ExportError: unreadable, not TOML, or a field missing, unknown or wrong.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ExportError(f"recipe '{path}' cannot be read: {error}") from error
    try:
        recipe = value_from_json(Recipe, found, path.name)
        merge_settings(recipe.defaults)
        for name in recipe.tasks:
            check_name(name)
    except (ManifestInvalid, MergeError) as error:
        raise ExportError(f"recipe '{path}' is not valid: {error}") from error
    if not recipe.tasks:
        raise ExportError(f"recipe '{path.name}' names no task")
    for name, task in recipe.tasks.items():
        unknown = sorted(set(task.served_by or {}) - set(recipe.tasks))
        if unknown:
            raise ExportError(f"task '{name}' of '{path.name}' is served by unknown tasks: {', '.join(unknown)}")
    return recipe
