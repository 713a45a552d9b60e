"""Markdown that all pages of the reference share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

NOTE = "Written by `python docs/generate.py` from the code; do not edit."


def anchor(heading: str) -> str:
    """The name by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def code(text: str) -> str:
    """Text in backticks, safe in a table cell."""
    return f"`{text}`".replace("|", "\\|")


def escaped(text: str) -> str:
    """Text that a table cell or a paragraph shows unchanged."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def json_text(value: object) -> str:
    """A value as JSON on one line."""
    return json.dumps(value, ensure_ascii=False)


def json_lines(value: Mapping[str, Any]) -> list[str]:
    """A JSON object with one field a line; its last field is an object and is opened as well."""
    *fields, (last, inner) = value.items()
    lines = [f"    {json_text(name)}: {json_text(item)}," for name, item in inner.items()]
    lines[-1] = lines[-1][:-1]
    return [
        "{",
        *(f"  {json_text(name)}: {json_text(item)}," for name, item in fields),
        f"  {json_text(last)}: {{",
        *lines,
        "  }",
        "}",
    ]
