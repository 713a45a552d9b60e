"""The tiny bundle's recipe in other words, what lies in a folder, and steps that fail as on a full disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgecompose import Request, open_bundle
from edgecompose.settings import RetrievalSettings
from tests.fixtures_tiny import ADAPTERS, TASKS, TinyZoo

PROMPT = TASKS["animals"][0]
NEAREST = Request(retrieval=RetrievalSettings(neighbours=1))
ALONE = Request(weights={})


def run(root: Path, prompt: str = PROMPT, request: Request | None = None) -> Any:
    with open_bundle(root, device="cpu") as opened:
        return opened.run(prompt, request)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def write_recipe(zoo: TinyZoo, folder: Path, *lines: str, tasks: dict[str, str] | None = None) -> Path:
    """The recipe of the tiny bundle with other lines on top, or with other tasks."""
    whole = zoo.recipe().read_text(encoding="utf-8")
    head, *bodies = whole.replace('= "', f'= "{zoo.root}/').replace(f'"{zoo.root}/tiny"', '"tiny"').split("[tasks.")
    if tasks is not None:
        bodies = [f"{name}]\n{content}\n" for name, content in tasks.items()]
    path = folder / "recipe.toml"
    path.write_text("[tasks.".join(["\n".join([*lines, head]), *bodies]), encoding="utf-8")
    return path


def task_lines(zoo: TinyZoo, name: str = "animals", **other: str) -> str:
    places = {"adapter": str(zoo.lora(name, **ADAPTERS[name])), "examples": str(zoo.task(name))} | other
    return "\n".join(f'{key} = "{place}"' for key, place in places.items())


def fail(*args: Any, **kwargs: Any) -> Any:
    raise OSError("disk full")


def fail_for(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of Path that fails for names with `part` in them."""

    def maybe(path: Path, *args: Any, **kwargs: Any) -> Any:
        return fail() if part in path.name else method(path, *args, **kwargs)

    return maybe
