"""What file systems do with names and bytes, and what some of them cannot."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What systems say of files and folders that they cannot flush: read-only handles and folders on Windows, some network
#: mounts. What is on such a disk is as safe as that system makes it.
_UNFLUSHED = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTSUP, errno.ENOSYS}
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
_AT_FDCWD, _EXCHANGE_LINUX, _EXCHANGE_MACOS = -100, 2, 2


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the error of a full disk say what was being written.

    Raises:
        OSError: of the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in _FULL:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def put(work: Path, target: Path) -> None:
    """Rename a file, over an older one, or a folder, over an empty one.

    Raises:
        OSError: that cannot be done.
    """
    try:
        if os.name == "nt" and work.is_dir() and target.is_dir():
            target.rmdir()
        work.replace(target)
    except PermissionError as error:
        message = "cannot be replaced; end the programs that have it open"
        raise PermissionError(error.errno, message, str(target)) from error


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step.

    Returns:
        False where the system or the file system cannot do that.
    """
    import ctypes  # it takes 10 ms to import, and few commands need it

    paths = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return bool(library.renamex_np(*paths, _EXCHANGE_MACOS) == 0)
        return bool(library.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _EXCHANGE_LINUX) == 0)
    except (AttributeError, OSError, TypeError):  # no such function; Windows has no library of that kind
        return False


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on disk, where the system can tell.

    Raises:
        OSError: the disk is full or broken.
    """
    if os.name == "nt" and path.is_dir():
        return
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNFLUSHED:
            raise


def read_plain(path: Path, limit: int) -> bytes:
    """The first `limit` + 1 bytes of a plain file; a pipe or a device is neither waited for nor read.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as stream:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(f"'{path}' is no plain file")
        return stream.read(limit + 1)
