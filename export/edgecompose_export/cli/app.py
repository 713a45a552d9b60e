"""The command group `edgecompose-export` and its commands."""

from __future__ import annotations

import click

from edgecompose_export import __version__
from edgecompose_export.cli.adapter import adapter, train
from edgecompose_export.cli.base import base, checkpoint
from edgecompose_export.cli.bundle import bundle
from edgecompose_export.cli.embedder import embedder, examples
from edgecompose_export.cli.fetch import fetch, merge_graphs
from edgecompose_export.cli.options import ExportGroup


@click.group(cls=ExportGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgecompose-export")
def main() -> None:
    """Make what `edgecompose` runs: bases, embedders, adapters, example indexes, bundles."""


for _command in (base, checkpoint, embedder, adapter, examples, train, bundle, fetch, merge_graphs):
    main.add_command(_command)
