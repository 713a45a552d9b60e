"""Files and folders that appear whole or not at all, whatever ends their writer.

What is new is written under a name of its own beside the target, `.NAME.PID.tmp`, flushed to the disk, and renamed. A
folder that replaces another changes places with it in one step, where the system can do that (Linux, macOS). Where it
cannot, the old folder is called `.NAME.PID.old` for a moment, and the next writer brings it back. The next writer also
removes what ended writers left; locks (`bundle.lock`) keep it from the files of live ones.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from edgecompose.bundle.lock import lock, short_name
from edgecompose.guard.filesystem import exchange, naming, put, sync

#: In a folder that files are being placed in: their names, until all are there. Older ones wait in the writer's folder.
UNFINISHED = ".unfinished.json"
_OLDER = ".older"
#: Names of what writers work at.
_WORK = re.compile(r"\.(.+\.)?\d+\.tmp")


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """A path beside `output` to write a file to, which gets that name when the block ends well.

    Raises:
        InUse: another process is writing it.
        FileExistsError: something has that name.
        OSError: it cannot be written.
    """
    with _locked(output) as (output, _), replaced_file(output) as work:
        yield work
        if output.exists():
            raise FileExistsError(errno.EEXIST, "exists; remove it, or give another name", str(output))


@contextmanager
def new_folder(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder beside `output` to write to, which gets that name when the block ends well, and is removed if not.

    Args:
        replace: take the place of a folder that has the name, in one step.

    Raises:
        InUse: another process is writing it.
        OSError: it cannot be made or renamed, as where `output` holds something and is not to be replaced.
    """
    with _locked(output) as (output, _), _folder_beside(output, replace=replace) as work:
        yield work


@contextmanager
def new_files(folder: Path, *, last: str) -> Iterator[Path]:
    """A folder to write files to, which get their places in `folder` together when the block ends well.

    A folder that is absent appears with them. In one that exists they are placed one after another, `last` at the end:
    without that one the others mean nothing.

    Args:
        last: the file that describes the others.

    Raises:
        InUse: another process is writing to the folder.
        OSError: they cannot be written; `folder` is as it was.
    """
    with _locked(folder) as (folder, held), files_together(folder, last=last, clean=held) as work:
        yield work


@contextmanager
def files_together(folder: Path, *, last: str, clean: bool = True) -> Iterator[Path]:
    """The same of a folder that is locked already.

    Args:
        clean: remove what ended writers left.
    """
    if not folder.exists():
        with _folder_beside(folder) as work:
            yield work
        return
    if clean:
        undo_unfinished(folder)
    with work_folder(folder, clean=clean) as work:
        yield work
        place(work, folder, last=last)


@contextmanager
def work_folder(folder: Path, *, clean: bool = True) -> Iterator[Path]:
    """A folder to write to inside of one that is locked.

    Args:
        clean: remove what ended writers left.
    """
    for path in folder.iterdir() if clean else ():
        if _WORK.fullmatch(path.name):
            _remove(path)
    work = folder / f".{os.getpid()}.tmp"
    _remove(work)  # of an ended process of the same number
    try:
        work.mkdir()
        yield work
    finally:
        _remove(work)


def place(
    work: Path,
    folder: Path,
    *,
    last: str = "",
    retired: Collection[str] = (),
    keep: Callable[[], set[str]] = set,
    commit: Callable[[], object] = lambda: None,
) -> None:
    """Move all files below `work` to the same places below `folder`, over older ones; all of them or none.

    Args:
        last: the file that is placed last, and whose older version goes first; others go with it. Without one, files
            take the places of older ones.
        retired: files of `folder` that are removed at the end.
        keep: gives the names of files that stay, whenever this ends.
        commit: called when all are placed, and before the first is removed.

    Raises:
        OSError: they cannot be flushed or renamed; `folder` is as it was.
    """
    files = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if not path.is_dir())
    files.sort(key=lambda name: name == last)
    for name in files:
        sync(work / name)
    note = folder / UNFINISHED
    try:
        write_text(note, json.dumps({"work": work.name, "files": files, "retired": list(retired)}))
        for name in reversed(files) if last else ():
            _move(folder, work / _OLDER, name)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            put(work / name, folder / name)
        for parent in {(folder / name).parent for name in files}:
            sync(parent)
        commit()
    except BaseException:
        undo_unfinished(folder, keep=keep)
        raise
    for name in retired:
        (folder / name).unlink(missing_ok=True)
    note.unlink()


def undo_unfinished(folder: Path, *, keep: Callable[[], set[str]] = set) -> None:
    """Take back what a writer was placing in a folder when it ended, and put older files back.

    Args:
        keep: gives the names of files that stay.

    Raises:
        OSError: that cannot be done; the next writer tries again.
    """
    note = folder / UNFINISHED
    if not os.path.lexists(note):
        return
    fields = _read_note(note)
    kept, work = keep(), folder / str(fields.get("work", ""))
    for name in _names_inside(folder, fields.get("files")):
        older = work / _OLDER / name
        if name in kept or (os.path.lexists(work / name) and not os.path.lexists(older)):
            continue  # it is the new bundle's, or it was not placed yet
        (folder / name).unlink(missing_ok=True)
        _move(work / _OLDER, folder, name)
    for name in _names_inside(folder, fields.get("retired")):
        if name not in kept:
            (folder / name).unlink(missing_ok=True)
    note.unlink(missing_ok=True)


def _read_note(note: Path) -> dict[str, Any]:
    """What `place` noted; nothing where the note is not its."""
    try:
        fields = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(fields, dict) and re.fullmatch(r"\.\d+\.tmp", str(fields.get("work")))
    return fields if is_ours else {}


def _names_inside(folder: Path, names: Any) -> Iterator[str]:
    """Those of some names that are of files inside a folder, whatever anybody wrote into a note."""
    root = folder.resolve()
    for name in names if isinstance(names, list) else ():
        if not isinstance(name, str) or "\0" in name or not PurePosixPath(name).parts:
            continue
        path = root / name
        if ".." not in path.parts and path.parent.resolve().is_relative_to(root) and not path.is_dir():
            yield name


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes its place when the block ends well.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    work = _beside(path, "tmp")
    try:
        yield work
        sync(work)
        put(work, path)
    finally:
        with suppress(OSError):
            work.unlink(missing_ok=True)
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one rename; its bytes are on disk when this returns. Errors are those of `replaced_file`."""
    with replaced_file(path) as work:
        work.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """The same of text, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def _move(source: Path, target: Path, name: str) -> None:
    """Move a file, if it is there, to the same place below another folder, unless one is there."""
    if os.path.lexists(source / name) and not os.path.lexists(target / name):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        put(source / name, target / name)


def remove_leftovers(output: Path) -> None:
    """Remove what ended writers of a locked file or folder left beside it, or bring an old folder back."""
    name = re.escape(short_name(output.name))
    for path in sorted(output.parent.glob(".*")):
        match = re.fullmatch(rf"\.{name}\.\d+\.(tmp|old)", path.name)
        if match is not None and match[1] == "old" and not output.exists():
            path.rename(output)
        elif match is not None:
            _remove(path)


@contextmanager
def _locked(output: Path) -> Iterator[tuple[Path, bool]]:
    """The real path of a file or folder that is locked now, and whether it is; what ended writers left is gone.

    Folders above it are made, and removed where nothing came to lie in them.
    """
    output = output.resolve()
    if any(_WORK.fullmatch(part) for part in output.parts):  # inside the folder of a writer, which has its own lock
        output.parent.mkdir(parents=True, exist_ok=True)
        yield output, False
        return
    made = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(output), lock(output) as held:
            if held:
                remove_leftovers(output)
            yield output, held
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _folder_beside(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder beside one that is locked, which takes its name, or its place, when the block ends well."""
    work = _beside(output, "tmp")
    _remove(work)  # of an ended process of the same number
    try:
        work.mkdir()
        yield work
        for path in (work, *work.rglob("*")):
            if not path.is_symlink():
                sync(path)
        if replace and output.exists():
            _replace_folder(work, output)
        else:
            put(work, output)
        sync(output.parent)
    finally:
        _remove(work)  # the old folder, where both changed places


def _replace_folder(work: Path, output: Path) -> None:
    """Give a folder the name of another, which is brought back where that fails."""
    if exchange(work, output):
        return
    old = _beside(output, "old")
    output.rename(old)
    try:
        work.rename(output)
    except BaseException:
        old.rename(output)
        raise
    _remove(old)


def _beside(path: Path, kind: str) -> Path:
    """A name beside a path that only this process uses."""
    return path.with_name(f".{short_name(path.name)}.{os.getpid()}.{kind}")


def _remove(path: Path) -> None:
    """Remove a file or folder as far as that is possible; the next writer removes the rest."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
