"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgecompose.bundle import atomic
from edgecompose.bundle.atomic import (
    UNFINISHED,
    new_file,
    new_files,
    new_folder,
    remove_leftovers,
    replaced_file,
    write_bytes,
    write_text,
)
from edgecompose.bundle.lock import lock
from edgecompose.errors import InUse
from tests.recipes import contents

#: Names that a note of a stranger may hold.
MINE = f'["../mine", "a/../../mine", "linked/mine", "", ".", "\\u0000", 3, "/{"x" * 300}"]'
#: What the writers below call of the operating system, each of which may fail.
CALLS = ("mkdir", "open", "fsync", "replace", "rename", "unlink", "ftruncate", "write")


def disk_full(*arguments: object, **options: object) -> Any:
    raise OSError(errno.ENOSPC, "disk full")


def write_folder(root: Path) -> None:
    with new_folder(root / "out", replace=True) as work:
        (work / "a").write_text("new", encoding="utf-8")


def write_file(root: Path) -> None:
    with new_file(root / "out" / "b") as work:
        work.write_text("new", encoding="utf-8")


def replace_file(root: Path) -> None:
    write_text(root / "out" / "a", "new")


def write_files(root: Path) -> None:
    with new_files(root / "out", last="a") as work:
        (work / "a").write_text("new", encoding="utf-8")
        (work / "c").mkdir()
        (work / "c" / "d").write_text("new", encoding="utf-8")


def write_new_files(root: Path) -> None:
    with new_files(root / "other", last="a") as work:
        (work / "a").write_text("new", encoding="utf-8")


WRITERS = (write_folder, write_file, replace_file, write_files, write_new_files)


def test_a_folder_gets_its_name_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "below" / "out"
    with new_folder(output) as work:
        (work / "a").write_text("x", encoding="utf-8")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["a"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "out") as work:
        (work / "a").touch()
        raise error
    with pytest.raises(error), new_file(tmp_path / "far" / "below" / "out") as work:
        work.touch()
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("one_step", [True, False])
def test_a_folder_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_step: bool) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    if not one_step:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "exchange", lambda one, other: False)
        patch.setattr(Path, "rename", lambda path, to: disk_full() if path.suffix == ".tmp" else rename(path, to))
        with pytest.raises(OSError, match="No space left on device"), new_folder(output, replace=True):
            pass
    assert [path.name for path in output.iterdir()] == ["old"]
    with new_folder(output, replace=True) as work:
        (work / "new").touch()
    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link", replace=True) as work:
        (work / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["new"]


def test_only_a_replacement_takes_the_place_of_something(tmp_path: Path) -> None:
    for name in ("folder", "file"):
        (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).touch()
        with pytest.raises(FileExistsError, match="exists; remove it"), new_file(tmp_path / name) as work:
            work.touch()
    (tmp_path / "folder" / "mine").touch()
    with pytest.raises(OSError, match="folder"), new_folder(tmp_path / "folder"):
        pass
    assert contents(tmp_path) == {"file": b"", "folder/mine": b""}


@pytest.mark.parametrize("length", [255, 200, 3])
def test_names_may_be_as_long_as_the_system_allows(tmp_path: Path, length: int) -> None:
    output = tmp_path / ("n" * length)
    with new_file(output) as work:
        work.touch()
    write_bytes(output, b"new")
    assert contents(tmp_path) == {output.name: b"new"}


def test_what_ended_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = (".out.1.tmp", ".out.22.old", ".other.1.tmp", ".out.tmp", ".out.x.tmp", "out.1.tmp", ".out.b.1.tmp")
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    (tmp_path / "mine").touch()
    (tmp_path / ".out.3.tmp").symlink_to("mine")
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*left[2:], "mine", "out"])


def test_an_old_folder_is_brought_back(tmp_path: Path) -> None:
    """Where folders change places in two steps, a writer may end between them."""
    (tmp_path / ".out.22.old").mkdir()
    (tmp_path / ".out.22.old" / "mine").touch()
    remove_leftovers(tmp_path / "out")
    assert contents(tmp_path) == {"out/mine": b""}


def test_files_of_a_live_writer_are_left_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as work, pytest.raises(InUse):
        (work / "a").touch()
        with new_folder(tmp_path / "out"):
            pass
    assert contents(tmp_path) == {"out/a": b""}


@pytest.mark.parametrize(
    "note",
    ["MINE", '{"work": "..", "files": MINE}', '{"work": ".1.tmp", "files": MINE, "retired": MINE}', "{", "[" * 9999],
)
def test_a_note_of_an_ended_writer_names_only_what_lies_in_the_folder(tmp_path: Path, note: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / "mine").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "mine").touch()
    (output / "linked").symlink_to("../linked")
    (output / UNFINISHED).write_text(note.replace("MINE", MINE), encoding="utf-8")
    with new_files(output, last="a") as work:
        (work / "a").touch()
    assert sorted(path.name for path in output.iterdir()) == ["a", "linked"]
    assert (tmp_path / "mine").exists() and (tmp_path / "linked" / "mine").exists()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", CALLS)
def test_any_step_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[[Path], None], name: str
) -> None:
    """The n-th call of each kind fails, for every n, and then the writer succeeds at once."""
    real = getattr(os, name)
    for failing in range(100):
        root = tmp_path / str(failing)
        (root / "out").mkdir(parents=True)
        (root / "out" / "a").write_text("old", encoding="utf-8")
        before, calls = contents(root), [0]

        def count(*arguments: Any, calls: list[int] = calls, failing: int = failing, **options: Any) -> Any:
            calls[0] += 1
            return disk_full() if calls[0] == failing + 1 else real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, count)
            try:
                writer(root)
                failed = False
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failed = True
        if failed and name not in ("open", "fsync", "unlink"):  # after it is in place, its folder is flushed
            assert {n: c for n, c in contents(root).items() if ".lock" not in n} == before
        (root / "out" / "b").unlink(missing_ok=True)
        writer(root)
        assert not [n for n in contents(root) if "/." in n or n.startswith(".")]
        if calls[0] <= failing:
            return
    raise AssertionError("it never ended")


def test_a_text_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one \u2028")
    with monkeypatch.context() as patch:
        patch.setattr("edgecompose.bundle.atomic.sync", disk_full)
        with pytest.raises(OSError, match="disk full"):
            write_text(path, "two")
    assert path.read_text(encoding="utf-8") == "one \u2028"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM])
def test_disks_that_cannot_flush_are_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Windows opens no folder and flushes no file that is open for reading; some network mounts flush nothing."""

    def refuse(*arguments: object) -> None:
        raise OSError(code, "cannot be flushed")

    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *more: refuse() if Path(path).is_dir() else real(path, *more))
    monkeypatch.setattr(os, "fsync", refuse)
    for writer in WRITERS:
        (tmp_path / writer.__name__ / "out").mkdir(parents=True)
        writer(tmp_path / writer.__name__)
    assert set(contents(tmp_path).values()) == {b"new"}


def test_a_file_that_another_program_has_open_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, "used by another process")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match=r"end the programs that have it open.*a\.txt"):
        write_text(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_held_does_not_disturb_a_plain_replacement(tmp_path: Path) -> None:
    with lock(tmp_path / "a"), replaced_file(tmp_path / "a") as work:
        work.write_bytes(b"new")
    assert contents(tmp_path) == {"a": b"new"}
