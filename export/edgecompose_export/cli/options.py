"""The kind of command group, and options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

from edgecompose.bundle.quantization import Bits
from edgecompose.cli.console import ErrorGroup

PathArgument = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
bits_option = click.option(
    "--bits", type=click.Choice(["4", "8", "16"]), default="4", show_default=True, help="Bits a weight; 16 is float16."
)


def bits_of(option: str) -> Bits:
    """The value of `bits_option` as a number."""
    return 16 if option == "16" else 8 if option == "8" else 4


class ExportGroup(ErrorGroup):
    """A command group that prints errors after the name of this program."""

    program = "edgecompose-export"
