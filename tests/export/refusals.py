"""What a refused export leaves, and says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")


def listed(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def one_line(result: Any, source: Path) -> str:
    """What the command said, which is one line that names the base, behind those of the steps that are done."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    *steps, line = result.stderr.splitlines()
    assert all(re.fullmatch(r"  .*: \d+\.\d s", step) for step in steps)
    assert line.startswith("edgecompose-export: ")
    assert source.name in line
    assert line.isprintable()
    assert len(line) < 900
    return str(line)
