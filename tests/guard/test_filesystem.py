"""What file systems cannot do is survived; what goes wrong is an error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from edgecompose.guard.filesystem import exchange, naming, put, sync


def test_two_folders_change_places_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system or file system has no such step")
    assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()
    assert not exchange(tmp_path / "one", tmp_path / "absent")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_broken_or_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, "broken")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="broken"):
        sync(tmp_path)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM])
def test_what_cannot_be_flushed_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, "cannot be flushed")

    for name in ("open", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            sync(tmp_path)


@pytest.mark.parametrize(("code", "says"), [(errno.ENOSPC, "No space left on device: '/a/b'"), (errno.EIO, "x")])
def test_the_error_of_a_full_disk_names_what_was_written(code: int, says: str) -> None:
    with pytest.raises(OSError, match=says) as raised, naming(Path("/a/b")):
        raise OSError(code, "x")
    assert raised.value.errno == code


def test_a_file_takes_the_place_of_another_and_a_folder_that_of_an_empty_one(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).write_text(name, encoding="utf-8")
        (tmp_path / f"{name} folder").mkdir()
    (tmp_path / "new folder" / "a").touch()
    put(tmp_path / "new", tmp_path / "old")
    put(tmp_path / "new folder", tmp_path / "old folder")
    assert (tmp_path / "old").read_text(encoding="utf-8") == "new"
    assert (tmp_path / "old folder" / "a").exists()
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError, match="old folder"):
        put(tmp_path / "other", tmp_path / "old folder")
