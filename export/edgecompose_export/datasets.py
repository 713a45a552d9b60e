"""Task examples as JSON lines; knows nothing of models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompose.errors import ExportError


@dataclass(frozen=True, slots=True)
class Example:
    """One line of a task file: a prompt and the answer that is wanted for it."""

    prompt: str
    answer: str
    choices: tuple[str, ...] | None = None


def read_examples(path: Path, *, limit: int | None = None) -> list[Example]:
    """Examples of a JSONL file whose lines have `prompt`, `answer` and optionally `choices`.

    Args:
        path: the file, UTF-8, one JSON object a line; blank lines are passed over.
        limit: read at most this many.

    Raises:
        ExportError: no file, no example, or a line that breaks the format; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"examples '{path}' cannot be read: {error}; give a UTF-8 JSONL file") from error
    examples = [
        _example(line, f"{path.name}:{number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip()
    ]
    if not examples:
        raise ExportError(f"examples '{path}' holds no example; one JSON object a line is wanted")
    return examples[:limit]


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ExportError: unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"'{path}' cannot be read as JSON: {error}; make it again") from error


def _example(line: str, place: str) -> Example:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{place} is not JSON ({error}); one JSON object a line is wanted") from error
    if not isinstance(found, dict):
        raise ExportError(f"{place} is a {type(found).__name__}; a JSON object is wanted")
    for key in ("prompt", "answer"):
        if not isinstance(found.get(key), str) or not found[key].strip():
            raise ExportError(f"{place} has no '{key}'; a non-empty string is wanted")
    choices = found.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(c, str) for c in choices)):
        raise ExportError(f"{place}: 'choices' is neither null nor a list of strings")
    return Example(found["prompt"], found["answer"], None if choices is None else tuple(choices))
