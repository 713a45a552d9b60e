"""The commands `edgecompose bundle ...`, which change a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from edgecompose.bundle.manifest import SCHEMA_VERSION
from edgecompose.bundle.upgrade import upgrade_bundle
from edgecompose.cli.options import bundle_argument, json_option, print_json


@click.group()
def bundle() -> None:
    """Change a bundle."""


@bundle.command()
@bundle_argument
@json_option
def upgrade(bundle: Path, as_json: bool) -> None:
    """Convert a bundle of an older edgecompose to the present schema, in place; only manifest.json changes.

    \b
    edgecompose bundle upgrade models/demo
    """
    changed = upgrade_bundle(bundle)
    if as_json:
        print_json({"bundle": str(bundle), "schema_version": SCHEMA_VERSION, "changed": changed})
    else:
        click.echo(f"{bundle}: {'converted to' if changed else 'has'} schema version {SCHEMA_VERSION}")
