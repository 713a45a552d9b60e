"""The runner counts what it must, keeps what reproduces a finding, and outlives its children."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecompose.errors import RetrievalError
from tests.attack.fuzz import table
from tests.attack.runner import FINDING_FILE, Runner, copy_tree
from tests.attack.target import Target

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


def _prepare(folder: Path) -> None:
    (folder / "value").write_text("0", encoding="utf-8")


def _mutate(rng: random.Random, folder: Path) -> None:
    (folder / "value").write_text(str(rng.randrange(1, 5)), encoding="utf-8")


def target_that(do: Callable[[], object], *, seconds: float = 10.0) -> Target:
    """A target that does something at the value 1, refuses 2, and accepts the others."""

    def attempt(folder: Path) -> str:
        value = (folder / "value").read_text(encoding="utf-8")
        if value == "1":
            do()
        if value == "2":
            raise RetrievalError("refused")
        return "accepted"

    return Target("fake", "cheap", _prepare, _mutate, attempt, seconds)


def _swell() -> None:
    blocks = [bytearray(os.urandom(1 << 20)) * 16 for _ in range(8)]
    time.sleep(20)
    del blocks


def _fail() -> None:
    raise KeyError("x")


def _be_wrong() -> None:
    raise AssertionError("another answer")


@pytest.mark.parametrize(
    ("kind", "do"),
    [
        ("crash", os.abort),
        ("hang", lambda: time.sleep(60)),
        ("memory", _swell),
        ("traceback", _fail),
        ("wrong", _be_wrong),
    ],
)
def test_each_kind_of_finding_is_counted_and_kept(kind: str, do: Callable[[], object], tmp_path: Path) -> None:
    numbers = [random.Random(f"3:fake:{case}").randrange(1, 5) for case in range(6)]
    target = target_that(do, seconds=0.3 if kind == "hang" else 10.0)
    runner = Runner(target, seed=3, root=tmp_path / "root", findings=tmp_path / "kept", memory_bytes=64 << 20)
    (tmp_path / "root").mkdir()
    summary = runner.run(cases=6)
    assert (summary.tried, summary.refused) == (6, numbers.count(2))
    assert dict(+summary.findings) == ({kind: numbers.count(1)} if 1 in numbers else {})
    assert summary.accepted == 6 - numbers.count(1) - numbers.count(2)
    kept = {int(Path(place).name.split("-")[-1]) for place in summary.places}
    assert kept == {case for case, value in enumerate(numbers) if value == 1} != set()
    record = json.loads((Path(summary.places[0]) / FINDING_FILE).read_text(encoding="utf-8"))
    assert (record["target"], record["seed"], record["kind"]) == ("fake", 3, kind)
    assert (Path(summary.places[0]) / "value").read_text(encoding="utf-8") == "1"
    assert "fake" in table([summary])


def test_a_finding_is_attempted_again_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    runner = Runner(target_that(_fail), seed=0, root=tmp_path / "root", findings=tmp_path / "kept")
    for value, outcome in (("1", "traceback"), ("2", "refused"), ("3", "accepted")):
        (tmp_path / value).mkdir()
        (tmp_path / value / "value").write_text(value, encoding="utf-8")
        assert runner.attempt(tmp_path / value) == outcome


def test_files_that_are_refused_undamaged_are_a_fault_of_the_target(tmp_path: Path) -> None:
    target = Target("fake", "cheap", _prepare, _mutate, lambda folder: str((folder / "none").read_bytes()))
    with pytest.raises(RuntimeError, match="unmutated files end in 'refused'"):
        Runner(target, seed=0, root=tmp_path, findings=tmp_path / "kept").run(cases=1)


def test_links_and_pipes_are_copied_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    os.mkfifo(source / "pipe")
    (source / "link").symlink_to("/nowhere")
    (source / "inner" / "file").write_bytes(b"x")
    copy_tree(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "pipe").is_fifo()
    assert (tmp_path / "copy" / "link").readlink() == Path("/nowhere")
    assert (tmp_path / "copy" / "inner" / "file").read_bytes() == b"x"
