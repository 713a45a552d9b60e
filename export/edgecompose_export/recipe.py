"""The recipe of a bundle, a TOML file, as frozen values."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompose.bundle.manifest import Defaults, check_name
from edgecompose.bundle.quantization import Bits
from edgecompose.bundle.records import read_document, value_from_json
from edgecompose.errors import ExportError, ManifestInvalid, MergeError
from edgecompose.merging.methods import method_of
from edgecompose.settings import MergeSettings, names_of

_RENAMED = {
    "admission": "'validation'",
    "tasks.served_by": "'adapters'",
    **{
        f"defaults.{name}": f"'{name}' in [defaults.retrieval]"
        for name in ("neighbours", "nucleus", "shortcut", "fallback")
    },
    "defaults.temperature": "'routing_temperature' in [defaults.retrieval]",
    "defaults.size_correction": "'class_size_exponent' in [defaults.retrieval]",
    **{f"defaults.{name}": f"'{name}' in [defaults.merge]" for name in names_of(MergeSettings)},
    "defaults.seed": "'dare_seed' in [defaults.merge]",
}


@dataclass(frozen=True, slots=True)
class RecipeTask:
    """One task of a recipe: an adapter (quantised file or PEFT folder) and, unless indexed already, its examples.

    `adapters` are weights of the recipe's adapters (by task) that the task is mapped to, by default its own at 1:
    another task's adapter, or a blend, may do better on its validation examples.
    """

    adapter: str
    examples: str | None = None
    adapters: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe file; paths are relative to it. `examples` is a folder made by `edgecompose-export examples`.

    `validation` is the JSON of `edgecompose eval --methods base,own --json` on validation examples: what each
    adapter gains.
    """

    name: str
    base: str
    embedder: str
    tasks: dict[str, RecipeTask]
    examples: str | None = None
    validation: str | None = None
    bits: Bits = 4
    keep_text: bool = False
    defaults: Defaults = Defaults()


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        ExportError: unreadable, not TOML, or a field missing, unknown or wrong.
    """
    try:
        fields = tomllib.loads(read_document(path))
    except RecursionError as error:
        raise ExportError(f"recipe '{path}' cannot be read: it is nested too deep; give a flat recipe") from error
    except (OSError, ValueError) as error:  # no TOML, no UTF-8, or an integer of thousands of digits
        raise ExportError(f"recipe '{path}' cannot be read: {error!s:.300}; give a TOML file in UTF-8") from error
    if _has_huge(fields):
        raise ExportError(
            f"recipe '{path}' holds a number of more than 64 bits, which TOML has not; give a smaller one"
        )
    _refuse_renamed(fields, path)
    try:
        recipe = value_from_json(Recipe, fields, f"recipe '{path}'", ExportError)
        method_of(recipe.defaults.merge)
        for name in recipe.tasks:
            check_name(name)
    except (ManifestInvalid, MergeError) as error:
        raise ExportError(f"recipe '{path}' is not valid: {error}") from error
    if not recipe.tasks:
        raise ExportError(f"recipe '{path.name}' names no task")
    for name, task in recipe.tasks.items():
        unknown = sorted(set(task.adapters or {}) - set(recipe.tasks))
        if unknown:
            raise ExportError(f"task '{name}' of '{path.name}' is mapped to unknown tasks: {', '.join(unknown)}")
    return recipe


def _has_huge(value: Any) -> bool:
    """Whether an integer is too large for TOML; Python reads it all the same, and cannot write it down."""
    if isinstance(value, (dict, list)):
        return any(map(_has_huge, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and value.bit_length() > 63


def _refuse_renamed(fields: Mapping[str, Any], path: Path) -> None:
    """Refuse keys that were called otherwise before schema 5 of bundles."""
    defaults, tasks = fields.get("defaults"), fields.get("tasks")
    places = [("", fields), ("defaults.", defaults)]
    places += [(f"tasks.{name}.", task) for name, task in tasks.items()] if isinstance(tasks, dict) else []
    for place, values in places:
        for name in values if isinstance(values, dict) else ():
            new = _RENAMED.get(f"{place.split('.')[0]}.{name}" if place else name)
            if new is not None:
                raise ExportError(f"recipe '{path}': '{place}{name}' is called {new} now; use that name")
