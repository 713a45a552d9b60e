"""A short run of `make chaos`: writers that are ended, and whose disks fail, leave the old, the new or nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgecompose.bundle import atomic
from tests.attack.chaos import table, wreak
from tests.attack.chaos_writers import Writer, make_parts
from tests.attack.disturbance import Disturbance, Mode, run_disturbed
from tests.fixtures_tiny import TinyZoo

#: It starts processes; `make check` leaves it out.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
#: One writer of each kind, and those whose libraries say nothing of a full disk; five cases each, one of each mode.
SHORT = ("bundle --force", "add-task", "examples into folder", "compose gguf", "batch")


def careless(root: Path, parts: Path) -> None:
    """A writer as none should be: it writes under the final name."""
    (root / "out").mkdir()
    for name in ("a", "b"):
        (root / "out" / name).write_text("x" * 10_000, encoding="utf-8")


def forgetful(root: Path, parts: Path) -> None:
    """A writer that leaves what an ended one left."""
    work = root / f"out.{os.getpid()}.tmp"
    work.write_text("x", encoding="utf-8")
    work.rename(root / "out")


def careful(root: Path, parts: Path) -> None:
    with atomic.new_folder(root / "out") as work:
        for name in ("a", "b"):
            (work / name).write_text("x" * 10_000, encoding="utf-8")


@pytest.mark.parametrize(("run", "is_right"), [(careless, False), (forgetful, False), (careful, True)])
def test_chaos_tells_a_careless_writer_from_a_careful_one(tmp_path: Path, run: object, is_right: bool) -> None:
    writer = Writer("test", lambda root, parts: None, run, "out")  # type: ignore[arg-type]
    (summary,) = wreak([writer], tmp_path, seed=0, cases=range(15))
    assert (summary.faults == []) == is_right
    assert sum(summary.ends.values()) == 15 and summary.ends["killed"] > 2
    again = next(iter(wreak([writer], tmp_path, seed=0, cases=range(15))))
    at_steps = [[f.split(":")[0] for f in one.faults if "before step" in f] for one in (summary, again)]
    assert at_steps[0] == at_steps[1]
    assert ("case" in table([summary])) or is_right


@pytest.mark.parametrize(
    ("mode", "how"), [("none", "done"), ("step", "killed"), ("error", "refused"), ("full", "refused")]
)
def test_a_run_ends_as_it_is_disturbed(tmp_path: Path, mode: Mode, how: str) -> None:
    disturbance = Disturbance(mode, step=2, bytes=100)
    end = run_disturbed(lambda: careful(tmp_path, tmp_path), tmp_path, disturbance, longest=20)
    assert end.how == how, end.log
    assert run_disturbed(lambda: 1 / 0, tmp_path, Disturbance("none"), longest=20).how == "raised"
    assert run_disturbed(lambda: signal.pause(), tmp_path, Disturbance("none"), longest=0.05).how == "hung"
    assert run_disturbed(lambda: os.abort(), tmp_path, Disturbance("none"), longest=20).how == "crashed"


@pytest.mark.slow
def test_a_short_run_finds_nothing(zoo: TinyZoo, tmp_path: Path) -> None:
    make_parts(zoo.root)
    arguments = ["--parts", str(zoo.root), "--kills", "1", "--seed", "1", "--json", "--writers", ",".join(SHORT)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'export'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.attack.chaos", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
        check=False,
    )
    summaries = json.loads(done.stdout)
    assert [fault for summary in summaries for fault in summary["faults"]] == [], done.stderr
    assert done.returncode == 0
    assert [sum(summary["ends"].values()) for summary in summaries] == [5] * len(SHORT)
