"""Progress on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich takes a tenth of the time that a command needs to start, and few commands show progress
    from rich.progress import Progress, ProgressColumn


def progress(*columns: ProgressColumn) -> Progress:
    """A progress display on stderr; it disappears at the end, and is silent where stderr cannot be redrawn."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    can_redraw = sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal
    return Progress(*columns, console=console, transient=True, disable=not can_redraw)


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
