"""Result files: JSON in benchmarks/results/."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_result(path: Path) -> dict[str, Any]:
    """The result in a file; empty if there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_result(path: Path, result: Any, *, indent: int | None = None, sort_keys: bool = False) -> None:
    """Write a result; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(result, indent=indent, sort_keys=sort_keys) + "\n", encoding="utf-8")
    partial.replace(path)


def write_dated(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    """Write a result to `<date>-<name>.json` in a folder, under the date that it holds."""
    path = folder / f"{result['date']}-{name}.json"
    write_result(path, result)
    return path
