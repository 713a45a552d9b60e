"""Runs something in a forked process that is ended, or whose disk fails, at a chosen step or moment."""

from __future__ import annotations

import errno
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from edgecompose.bundle import atomic
from edgecompose.errors import EdgeComposeError
from edgecompose.guard import filesystem

#: 'step': SIGKILL before a step, 'moment': at a moment of time, 'error': one step fails, as on a broken disk, 'full':
#: no file may grow beyond some bytes, which the libraries that are not Python meet as well.
Mode = Literal["none", "step", "moment", "error", "full"]
MODES: tuple[Mode, ...] = ("step", "moment", "step", "error", "full")
How = Literal["killed", "done", "refused", "raised", "crashed", "hung"]
#: Audit events of Python that change what is on a disk, or take a lock.
_CHANGES = {f"os.{name}" for name in ("rename", "remove", "rmdir", "mkdir", "truncate", "link", "symlink")}
_EVENTS = {*_CHANGES, "fcntl.flock"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_ERRORS = (errno.ENOSPC, errno.EIO)


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What happens to a run, at which step, second or byte."""

    mode: Mode
    step: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def __str__(self) -> str:
        places = {"step": f"before step {self.step}", "moment": f"after {self.seconds:.3f} s"}
        places |= {"error": f"step {self.step} fails", "full": f"no file beyond {self.bytes} bytes"}
        return places.get(self.mode, self.mode)


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended, after how many steps and seconds, and the end of what it said."""

    how: How
    steps: int
    seconds: float
    log: str


def run_disturbed(action: Callable[[], object], folder: Path, disturbance: Disturbance, *, longest: float) -> End:
    """Run an action in a forked process.

    Args:
        folder: steps that concern other places do not count.
        longest: seconds after which it hangs.
    """
    reading, writing = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(action, folder, disturbance, writing)  # it does not return
    os.close(writing)
    limit = disturbance.seconds if disturbance.mode == "moment" else longest
    status = _wait(child, began + limit)
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        how: How = "killed" if disturbance.mode == "moment" else "hung"
    else:
        how = _how(status)
    with os.fdopen(reading, "rb") as stream:
        text = stream.read().decode("utf-8", "replace")
    steps, _, log = text.partition("\n")
    return End(how, int(steps) if steps.isdigit() else 0, time.monotonic() - began, log[-1500:])


def _wait(child: int, until: float) -> int | None:
    """The exit status of a child, None where it is still running then."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() > until:
            return None
        time.sleep(0.001)


def _how(status: int) -> How:
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else "crashed"
    return {0: "done", 1: "refused"}.get(os.WEXITSTATUS(status), "raised")  # type: ignore[return-value]


def _run(action: Callable[[], object], folder: Path, disturbance: Disturbance, report: int) -> None:
    """The child: disturb, run, report steps and log, exit."""
    log, code, steps = "", 2, _Steps(folder, disturbance)
    faulthandler.disable()
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silence, descriptor)
        tempfile.tempdir = str(folder.parent)  # what a killed process leaves there goes with the folder
        if hasattr(os, "sched_setaffinity"):  # one thread a library: others wait busily, and take a fork's time
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
        steps.watch()
        if disturbance.mode == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (disturbance.bytes, resource.RLIM_INFINITY))
        action()
        code = 0
    except (EdgeComposeError, OSError, click.ClickException) as error:
        log, code = f"{type(error).__name__}: {error}", 1
    except BaseException:
        log = traceback.format_exc()
    finally:
        steps.active = False
        os.write(report, f"{steps.count}\n{log}".encode("utf-8", "replace")[-60_000:])
        os._exit(code)


class _Steps:
    """Counts steps of this process that change what is in a folder, and disturbs one of them."""

    def __init__(self, folder: Path, disturbance: Disturbance) -> None:
        self._folder, self._disturbance = str(folder), disturbance
        self.count, self.active = 0, False

    def watch(self) -> None:
        """Watch from now on; this cannot be undone in this process."""
        sys.addaudithook(self._audit)
        flush, exchange = os.fsync, filesystem.exchange

        def fsync(descriptor: Any) -> None:
            self._step()
            flush(descriptor)

        def exchanged(one: Path, other: Path) -> bool:
            self._step()
            done = exchange(one, other)
            self._step()
            return done

        for place, name, replacement in ((os, "fsync", fsync), (atomic, "exchange", exchanged)):
            setattr(place, name, replacement)
        self.active = True

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, mode, flags = arguments
            is_writing = bool(flags & _WRITING) if isinstance(flags, int) else any(c in str(mode) for c in "wxa+")
            if not is_writing or not self._is_inside(path):
                return
        elif event not in _EVENTS or not (event == "fcntl.flock" or self._is_inside(arguments[0])):
            return
        self._step()

    def _is_inside(self, path: object) -> bool:
        return isinstance(path, int) or self._folder in str(path)

    def _step(self) -> None:
        if not self.active:
            return
        self.count += 1
        if self.count != self._disturbance.step:
            return
        if self._disturbance.mode == "step":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._disturbance.mode == "error":
            code = _ERRORS[self.count % len(_ERRORS)]
            raise OSError(code, os.strerror(code))
