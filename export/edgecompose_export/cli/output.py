"""Progress on standard error, results on standard output."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from edgecompose.cli.console import progress
from edgecompose.cli.terminal.streams import json_line


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """A spinner with the name of the current step; a finished step leaves a line with its time."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with progress(*columns) as bar:
        task = bar.add_task("starting", total=None)
        current: list[tuple[str, float]] = []

        def finish() -> None:
            if current:
                name, start = current.pop()
                bar.console.print(f"  {name}: {time.monotonic() - start:.1f} s", highlight=False)

        def advance(step: str) -> None:
            finish()
            current.append((step, time.monotonic()))
            bar.update(task, description=step)

        yield advance
        finish()


@contextmanager
def training_bar() -> Iterator[Callable[[int, int, float], None]]:
    """A bar of training steps with the loss of the last one."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with progress(*columns) as bar:
        task = bar.add_task("training", total=None, loss=0.0)
        yield lambda step, steps, loss: bar.update(task, completed=step, total=steps, loss=loss)


@contextmanager
def fetching_bar() -> Iterator[Callable[[str, float, float], None]]:
    """A bar of a download, which appears at the first step."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = progress(*columns)
    task = bar.add_task("starting", total=None)

    def advance(step: str, done: float, total: float) -> None:
        bar.start()  # not earlier, as a question about terms comes first
        bar.update(task, description=step, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


def print_result(text: str, value: Any, as_json: bool) -> None:
    """Print the text, or the value as one JSON object."""
    if not as_json:
        click.echo(text)
    else:
        click.echo(json_line(value if isinstance(value, dict) else dataclasses.asdict(value)))
