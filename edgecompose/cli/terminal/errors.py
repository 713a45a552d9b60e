"""Ends a command with one line on standard error and an exit code, whatever was raised."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import click

from edgecompose.cli.terminal import signals
from edgecompose.cli.terminal.streams import discard_output
from edgecompose.errors import EdgeComposeError

#: Variable that asks for the traceback of an error, whatever its value.
_VARIABLE = "EDGECOMPOSE_TRACEBACK"
_INTERRUPTED = signals.exit_code(signal.SIGINT)
#: What SIGPIPE would lead to, had Python not replaced it by an error; Windows has no such signal.
_BROKEN_PIPE = signals.exit_code(getattr(signal, "SIGPIPE", 13))
#: Of a name in a message.
_MOST_CHARACTERS = 300
#: What to do about errors of the system.
_ADVICE: Mapping[int | None, str] = MappingProxyType(
    {
        errno.EACCES: "check who owns it and its permissions",
        errno.EPERM: "check who owns it and its permissions",
        errno.EROFS: "give a place that can be written",
        errno.EISDIR: "expected a file, not a folder",
        errno.ENOTDIR: "expected a folder",
        errno.ENOENT: "check the name",
        errno.ENAMETOOLONG: "give a shorter name",
        errno.ELOOP: "its links lead in a circle; give another path",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.ENFILE: "close other programs",
        errno.ENOMEM: "close other programs, or use a machine with more memory",
        errno.ENOSPC: "free space on the disk and run the command again",
        errno.EDQUOT: "free space in the quota and run the command again",
        errno.EBADF: "it is closed; give a file, a pipe or a terminal",
        errno.EIO: "check the device",
    }
)


class ErrorGroup(click.Group):
    """A command group that ends with one line for an error, and with 128 plus the number of a signal."""

    program = "edgecompose"

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command and exit; see click's method."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        sys.exit(self._exit_code(lambda: run(*args, standalone_mode=False, **extra)))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; warnings are lines of the program."""
        with warnings.catch_warnings():
            warnings.showwarning = self._show_warning
            return super().invoke(ctx)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command, whose work can then be interrupted."""
        resolved = super().resolve_command(ctx, args)
        ctx.with_resource(signals.unwinding())
        return resolved

    def _show_warning(self, message: Warning | str, *_: object, **__: object) -> None:
        click.echo(f"{self.program}: warning: {one_line(str(message))}", err=True)

    def _exit_code(self, run: Callable[[], Any]) -> int:
        try:
            code = run()
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except BaseException as error:  # of extension modules too, whose panics are no Exceptions
            return _report(error, self.program)


def _report(error: BaseException, program: str) -> int:
    """Say what happened, and return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if _interrupted(error):
        return _INTERRUPTED
    if isinstance(error, OSError):
        discard_output()
    if isinstance(error, BrokenPipeError):
        return _BROKEN_PIPE
    if os.environ.get(_VARIABLE):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    click.echo(f"{program}: {one_line(_described(error))}", err=True)
    return getattr(error, "exit_code", EdgeComposeError.exit_code)


def _interrupted(error: BaseException) -> bool:
    """Whether it comes of SIGINT; click turns that into an error of its own, as it does the end of the input."""
    if isinstance(error, click.Abort):
        return not isinstance(error.__cause__ or error.__context__, EOFError)
    return isinstance(error, KeyboardInterrupt)


def _described(error: BaseException) -> str:
    if isinstance(error, EdgeComposeError):
        return str(error)
    if isinstance(error, ImportError):
        return f"{error}; install edgecompose again" if isinstance(error, ModuleNotFoundError) else str(error)
    if isinstance(error, click.Abort):
        return "the input ended before the question was answered"
    if isinstance(error, OSError):
        names = [name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, os.PathLike))]
        place = " -> ".join(f"'{os.fsdecode(name):.{_MOST_CHARACTERS}}'" for name in names)
        text = error.strerror or str(error) or type(error).__name__
        return "; ".join(filter(None, [f"{place}: {text}" if place else text, _ADVICE.get(error.errno)]))
    if isinstance(error, MemoryError):
        return f"out of memory; {_ADVICE[errno.ENOMEM]}"
    return f"internal error: {type(error).__name__}: {error}; please report it ({_VARIABLE}=1 shows where it happened)"


def one_line(text: str) -> str:
    """Text in one line without control characters, because names in damaged files may hold any."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
