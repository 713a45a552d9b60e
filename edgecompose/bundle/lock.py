"""Locks: one process at a time writes a file or folder, and a second one learns who the first is.

A lock is a small file beside what is written, `.NAME.lock`, which the operating system unlocks when its process ends,
however it ends. Readers never look at it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from edgecompose.bundle.records import value_from_json
from edgecompose.errors import EdgeComposeError, InUse

#: The lock of a folder whose parent cannot be written to; it lies inside.
INNER_LOCK = ".lock"
_LONGEST, _LONGEST_NAME = 4096, 200
#: What systems say where another process has the lock, where a file system has no locks, and of a folder where nothing
#: may be made.
_BUSY = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
_MISSING = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


class LocksMissing(UserWarning):
    """The file system has no locks, so that two writers would not notice each other."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that has a lock; `command` is its name without arguments, which may be private."""

    pid: int
    host: str
    command: str
    since: str


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Keep other writers from a file or folder, which need not exist, until the block ends.

    Yields:
        Whether it is locked: not where the file system has no locks, which a warning says.

    Raises:
        InUse: another process, or another thread, is writing it.
        OSError: the lock file cannot be made.
    """
    path = path.resolve()
    descriptor, file = _open(path)
    while True:
        try:
            held = _lock(descriptor)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in _BUSY:
                raise
            raise InUse(_busy(path, holder)) from error
        if not held or file == path or _is_at(descriptor, file):
            break
        os.close(descriptor)  # its holder has removed the file just before
        descriptor, file = _open(path)
    if not held:
        warnings.warn(
            f"'{file.parent}' is on a file system without locks; do not write '{path.name}' with two commands at once",
            LocksMissing,
            stacklevel=3,
        )
    try:
        if held and file != path:
            _describe(descriptor)
        yield held
    finally:
        if file == path:
            os.close(descriptor)
        else:
            _remove(descriptor, file)


def short_name(name: str) -> str:
    """A name, or what stands for one that is too long to be made longer."""
    if len(os.fsencode(name)) <= _LONGEST_NAME:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def _open(path: Path) -> tuple[int, Path]:
    """The lock file of a path, made if need be: beside it, in it, or the file itself where nothing can be made."""
    file = path.with_name(f".{short_name(path.name)}.lock")
    try:
        return _open_file(file), file
    except OSError as error:
        if error.errno not in _CLOSED or not path.exists():
            raise
    file = path / INNER_LOCK if path.is_dir() else path
    return _open_file(file), file


def _open_file(file: Path) -> int:
    options = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | options, 0o666)
    except PermissionError:
        if not file.exists():
            raise
        descriptor = os.open(file, os.O_RDONLY | options)  # another user's
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no plain file, so it cannot be a lock; remove it", str(file))
    return descriptor


def _lock(descriptor: int) -> bool:
    """Lock a file at once; False where the file system cannot.

    Raises:
        OSError: another has the lock.
    """
    try:
        if sys.platform == "win32":  # pragma: no cover - bytes that nobody reads, since locked ones cannot be read
            import msvcrt

            os.lseek(descriptor, 1 << 30, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _MISSING:
            return False
        raise
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the opened file is the one that has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except OSError:
        return False


def _describe(descriptor: int) -> None:
    """Write who has the lock, where the file is empty or a lock of ours; a full disk is no reason to stop."""
    if os.fstat(descriptor).st_size and _holder(descriptor) is None:
        return
    import socket  # only writers need it

    now = time.strftime("%Y-%m-%d %H:%M:%S")
    content = json.dumps(asdict(Holder(os.getpid(), socket.gethostname(), _command(), now))).encode()
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        if os.write(descriptor, content) < len(content):
            os.ftruncate(descriptor, 0)


def _holder(descriptor: int) -> Holder | None:
    """Who has a lock, None where the file does not say."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        return value_from_json(Holder, json.loads(os.read(descriptor, _LONGEST)), "lock")
    except (OSError, ValueError, RecursionError, EdgeComposeError):
        return None


def _remove(descriptor: int, file: Path) -> None:
    """Remove the lock file, unless it holds what others wrote, and release the lock."""
    empty = os.fstat(descriptor).st_size == 0
    with suppress(OSError):  # Windows removes no open file
        if (empty or _holder(descriptor) is not None) and _is_at(descriptor, file):
            file.unlink()
    os.close(descriptor)
    if sys.platform == "win32":  # pragma: no cover - fails where another has opened it
        with suppress(OSError):
            file.unlink()


def _command() -> str:
    """What runs here: the program, and of our own ones the command, without arguments (they may hold prompts)."""
    program = Path(sys.argv[0] if sys.argv else "")
    name = program.parent.name if program.name == "__main__.py" else program.stem
    name = name.replace("_", "-")
    if not name.startswith("edgecompose"):
        return name or "python"
    words = sys.argv[1:3] if sys.argv[1:2] == ["bundle"] else sys.argv[1:2]
    return " ".join([name, *(word for word in words if word.replace("-", "").isalpha())])


def _busy(path: Path, holder: Holder | None) -> str:
    if holder is None:
        return f"'{path}' is being written by another process; wait until it ends, and run this again"
    return (
        f"'{path}' is being written by process {holder.pid} on {holder.host} since {holder.since} "
        f"({holder.command!r:.80}); wait until it ends, or stop it, and run this again"
    )
