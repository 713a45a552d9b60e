"""Writes docs/reference/ from the code: `python docs/generate.py`.

tests/test_reference.py fails when the pages and the code differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))

from docs.reference_generator.commands import cli_page
from docs.reference_generator.http_api import http_page
from docs.reference_generator.python_names import python_page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"


def pages() -> dict[Path, str]:
    """Text of every page of the reference, by file."""
    texts = {"cli.md": cli_page(), "python.md": python_page(), "http.md": http_page()}
    return {FOLDER / name: f"{text.rstrip()}\n" for name, text in texts.items()}


def main() -> None:
    """Write every page and print its path."""
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
