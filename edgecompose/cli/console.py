"""What both commands share: errors as one line and an exit code, and progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from edgecompose.errors import EdgeComposeError

if TYPE_CHECKING:  # rich takes a tenth of the time that a command needs to start, and few commands show progress
    from rich.progress import Progress, ProgressColumn


class ErrorGroup(click.Group):
    """A command group that prints our errors, and those of the file system, as one line after the program's name."""

    program = "edgecompose"

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            sys.stderr.close()
            ctx.exit(EdgeComposeError.exit_code)
        except (EdgeComposeError, OSError) as error:
            click.echo(f"{self.program}: {_one_line(str(error))}", err=True)
            ctx.exit(getattr(error, "exit_code", EdgeComposeError.exit_code))


def _one_line(text: str) -> str:
    """Text in one line without control characters, because names in damaged files may hold any."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def progress(*columns: ProgressColumn) -> Progress:
    """A progress display on stderr; it disappears at the end, and is silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def counting(name: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """A bar of counted work with the time left; what it yields is called with how much was done."""
    from rich.progress import MofNCompleteColumn

    with _bar(name, total, MofNCompleteColumn()) as advance:
        yield advance


@contextmanager
def counting_bytes(name: str, total: int) -> Iterator[Callable[[float], None]]:
    """The same of work that is counted in bytes."""
    from rich.progress import DownloadColumn

    with _bar(name, total, DownloadColumn()) as advance:
        yield advance


@contextmanager
def _bar(name: str, total: float | None, amount: ProgressColumn) -> Iterator[Callable[[float], None]]:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    with progress(TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn()) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)
