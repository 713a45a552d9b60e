"""The kind of command group, and options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

from edgecompose.cli.terminal.errors import ErrorGroup

PathArgument = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


class ExportGroup(ErrorGroup):
    """A command group that prints errors after the name of this program."""

    program = "edgecompose-export"
