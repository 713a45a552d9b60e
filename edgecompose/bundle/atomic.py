"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: Path, *, put: Callable[[Path, Path], object] = Path.rename) -> Iterator[Path]:
    """A folder beside `output` to write to, which gets that name when the block ends well, and is removed if not.

    Args:
        put: gives the folder (first) that name (second), by default where nothing has it.

    Raises:
        OSError: it cannot be made or renamed, as where `output` holds something.
    """
    work = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        put(work, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def replace_folder(work: Path, output: Path) -> None:
    """Put the folder `work` in the place of `output`, which is brought back where that fails.

    Raises:
        OSError: one of them cannot be renamed.
    """
    if output.exists():
        old = output.with_name(f".{output.name}.{os.getpid()}.old")
        output.rename(old)
        try:
            work.rename(output)
        except BaseException:
            old.rename(output)
            raise
        shutil.rmtree(old)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        work.rename(output)
    sync(output.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file in one rename; its bytes are on disk when this returns.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        work.write_text(text, encoding="utf-8")
        sync(work)
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
