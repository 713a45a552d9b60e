"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_python_example_is_under_ten_lines_and_runs() -> None:
    found = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert found is not None
    assert len(found[1].splitlines()) < 10
    if not (ROOT / "models" / "demo" / "manifest.json").is_file():
        pytest.skip("models/demo is not built; run 'make bundle'")
    command = [sys.executable, "-c", found[1]]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "yelp" in finished.stdout


def test_every_path_in_the_tree_exists() -> None:
    tree = re.search(r"```text\n(edgecompose/.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    folder = ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
            assert (ROOT / name).is_dir(), name
        else:
            assert (ROOT / folder / name).exists(), f"{folder}{name}"


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
