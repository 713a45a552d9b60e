"""Task examples as JSON lines, and JSON files; knows nothing of models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompose.errors import ExportError


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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"examples '{path}' cannot be read: {error}; give a UTF-8 JSONL file") from error
    examples = [
        _example(line, f"{path.name}:{number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip()
    ]
    if not examples:
        raise ExportError(f"examples '{path}' holds no example; expected one JSON object a line")
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
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{place} is not JSON ({error}); expected one JSON object a line") from error
    if not isinstance(fields, dict):
        raise ExportError(f"{place} is a {type(fields).__name__}, expected a JSON object")
    for key in ("prompt", "answer"):
        if not isinstance(fields.get(key), str) or not fields[key].strip():
            raise ExportError(f"{place} has no '{key}', expected a non-empty string")
    choices = fields.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(c, str) for c in choices)):
        raise ExportError(f"{place}: 'choices' is {choices!r:.40}, expected null or a list of strings")
    return Example(fields["prompt"], fields["answer"], None if choices is None else tuple(choices))
