"""Ends a command on SIGINT, SIGTERM and SIGHUP with 128 plus the signal's number, and without a traceback.

Until a command begins to work a signal ends the process at once: there is nothing to clean up. While it works the first
signal unwinds it, so that temporary files go and lines are whole; a second one, or GRACE seconds, end it at once, also
where native code does not return.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: Seconds that a command has to unwind, and those that an import has to end before.
GRACE, IMPORT_GRACE = 10.0, 1.0
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_NUMBERS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
#: What wakes the main thread, how often after each signal, and the seconds between.
_POKE, _POKES, _POKE_PAUSE = getattr(signal, "SIGURG", 0), 10, 0.1
_NEVER = float("inf")
#: Where a process may open fewer files, all are left to its work.
_SCARCE = 32
_SHOW_CURSOR = b"\x1b[?25h"
#: A signal that unwinds the work when the present import has ended, 0 for none.
_deferred = 0
#: Whether a thread pokes the main thread.
_watched = False


def exit_at_once() -> None:
    """Let signals end the process at once. One that the parent ignores, as nohup does, stays ignored."""
    for number in _NUMBERS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _exit)
    sys.unraisablehook = _not_lost


@contextmanager
def unwinding() -> Iterator[None]:
    """Let the first signal unwind the work inside; does nothing unless `exit_at_once` was called.

    Raises:
        KeyboardInterrupt: on SIGINT.
        SystemExit: on the others, with 128 plus the number.
    """
    numbers = [number for number in _NUMBERS if signal.getsignal(number) is _exit]
    if numbers and os.name == "posix" and os.sysconf("SC_OPEN_MAX") >= _SCARCE:
        _watch()
    for number in numbers:
        signal.signal(number, _unwind)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, _exit)
        if _deferred:
            _exit(_deferred)


@contextmanager
def handling(number: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Deal with a signal by `handler` inside, unless the parent lets it be ignored."""
    previous = signal.getsignal(number)
    if previous is not signal.SIG_IGN:
        signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


def exit_code(number: int) -> int:
    """The exit code that a signal leads to, as shells count."""
    return 128 + number


def _exit(number: int, frame: FrameType | None = None) -> None:
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)  # which a progress bar hides
    os._exit(exit_code(number))


def _unwind(number: int, frame: FrameType | None) -> None:
    global _deferred
    if _deferred:
        _exit(number)
    _deferred = number
    _unwind_now(0, frame)


def _unwind_now(poke: int, frame: FrameType | None) -> None:
    """Raise what the signal leads to, unless a module is imported: extension modules abort the process at that."""
    global _deferred
    if not _deferred or (_watched and _is_importing(frame)):
        return
    number, _deferred = _deferred, 0
    for each in _NUMBERS:
        if signal.getsignal(each) is _unwind:
            signal.signal(each, _exit)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(exit_code(number))


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _not_lost(unraisable: sys.UnraisableHookArgs) -> None:
    """End the process where what a signal raised cannot go on, as in a destructor."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _exit(signal.SIGINT)
    if isinstance(unraisable.exc_value, SystemExit):
        _exit(int(unraisable.exc_value.code or 0) - exit_code(0))
    sys.__unraisablehook__(unraisable)


def _watch() -> None:
    """Watch for signals in a thread: the main thread sees none while it is in native code."""
    import threading

    global _watched
    _watched = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(_POKE, _unwind_now)
    main = threading.main_thread().ident
    threading.Thread(target=_attend, args=(reader, main), name="edgecompose-signals", daemon=True).start()


def _attend(reader: int, main: int) -> None:
    """Read numbers of signals, until one that ends the command comes twice or its grace is over.

    The main thread is poked after each: a signal that comes right before a wait for input does not end that wait, and
    one that comes during an import is deferred.
    """
    ending, end, pokes = 0, _NEVER, 0.0
    while (now := time.monotonic()) < (end - GRACE + IMPORT_GRACE if _deferred else end):
        wait = min(end - now, _POKE_PAUSE if pokes else _NEVER)
        if not select.select([reader], [], [], None if wait == _NEVER else wait)[0]:
            if pokes:
                signal.pthread_kill(main, _POKE)
                pokes -= 1
            continue
        number = os.read(reader, 1)[0]
        if number == _POKE:
            continue
        pokes = max(pokes, _POKES)
        if signal.getsignal(number) in (_unwind, _exit):  # and not one that a chat or a server deals with itself
            if ending:
                break
            ending, end, pokes = number, now + GRACE, _NEVER
    _exit(ending)
