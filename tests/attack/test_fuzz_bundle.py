"""A short, seeded round of the attacks on a bundle's files: nothing crashes, hangs, swells, or is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.attack.bundle_targets import TARGETS
from tests.attack.full_targets import TARGETS as FULL
from tests.attack.full_targets import prepare_from
from tests.attack.fuzz import main

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
ROOT = Path(__file__).parents[2]


def fuzz(findings: Path, *arguments: object) -> list[dict[str, Any]]:
    """What `make fuzz` says; a process of its own, since a child of one that has threads may hang."""
    command = [sys.executable, "-m", "tests.attack.fuzz", "--json", "--findings", findings, *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return list(json.loads(done.stdout))


def test_damaged_files_are_refused_or_give_sound_results(tmp_path: Path) -> None:
    names = ",".join(target.name for target in TARGETS if target.name != "large-index")  # it takes seconds to make
    for one in fuzz(tmp_path, "--targets", names, "--cases", 50, "--seed", 7):
        assert one["tried"] == 50 == one["refused"] + one["accepted"], one
        assert one["refused"] > 10, f"{one['target']} is hardly damaged"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_damaged_bundle_is_refused_or_answers(bundle: Path, tmp_path: Path) -> None:
    first = tmp_path / "prepared" / FULL[0].name
    first.mkdir(parents=True)
    prepare_from(bundle, first)
    for target in FULL[1:]:
        (tmp_path / "prepared" / target.name).symlink_to(first)
    for one in fuzz(tmp_path / "kept", "--targets", "full", "--cases", 3, "--prepared", tmp_path / "prepared"):
        assert one["tried"] == 3 == one["refused"] + one["accepted"], one


def test_a_name_that_is_no_target_is_one_line() -> None:
    done = CliRunner().invoke(main, ["--targets", "nothing"])
    assert done.exit_code == 2 and "no target 'nothing'; there are: manifest" in " ".join(done.output.split())
