"""The commands `edgecompose bundle ...`, which change a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import click

from edgecompose.bundle.manifest import SCHEMA_VERSION, Manifest
from edgecompose.bundle.quantization import Bits
from edgecompose.bundle.upgrade import upgrade_bundle
from edgecompose.cli.console import counting
from edgecompose.cli.options import bundle_argument, json_option, print_json
from edgecompose.formats.registry import READABLE
from edgecompose.tasks import add_task, measure_tasks, remove_task

bits_option = click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in get_args(Bits)]),
    default="4",
    show_default=True,
    help="Bits a weight; 16 is float16.",
)


def bits_of(option: str) -> Bits:
    """The value of `bits_option` as a number."""
    return 16 if option == "16" else 8 if option == "8" else 4


@click.group()
def bundle() -> None:
    """Change a bundle: add and remove tasks, convert an older one."""


@bundle.command("add-task")
@bundle_argument
@click.argument("name")
@click.option(
    "--adapter",
    "adapter_path",
    type=click.Path(path_type=Path),
    required=True,
    help=f"A quantised adapter, or {', '.join(row.help for row in READABLE)}.",
)
@click.option(
    "--examples",
    "examples_file",
    type=click.Path(path_type=Path),
    required=True,
    help="JSON lines with prompt and answer: the prompts that the task is recognised by.",
)
@bits_option
@json_option
def add_task_command(
    bundle: Path, name: str, adapter_path: Path, examples_file: Path, bits: str, as_json: bool
) -> None:
    """Add the task NAME to a bundle: its adapter, and examples of its prompts.

    \b
    edgecompose bundle add-task models/demo wic --adapter lora/wic --examples wic.jsonl
    """
    with counting("embedding", 1) as advance:
        manifest = add_task(
            bundle,
            name,
            adapter=adapter_path,
            examples=examples_file,
            bits=bits_of(bits),
            advance=lambda done, of: advance(1 / of),
        )
    print_manifest(bundle, manifest, as_json)


@bundle.command("remove-task")
@bundle_argument
@click.argument("name")
@json_option
def remove_task_command(bundle: Path, name: str, as_json: bool) -> None:
    """Remove the task NAME, its examples, and its adapter unless another task uses it.

    \b
    edgecompose bundle remove-task models/demo wic
    """
    print_manifest(bundle, remove_task(bundle, name), as_json)


@bundle.command()
@bundle_argument
@json_option
def upgrade(bundle: Path, as_json: bool) -> None:
    """Convert a bundle of an older edgecompose to the present schema, in place; only manifest.json changes.

    \b
    edgecompose bundle upgrade models/demo
    """
    changed = upgrade_bundle(bundle)
    changed = measure_tasks(bundle) or changed
    if as_json:
        print_json({"bundle": str(bundle), "schema_version": SCHEMA_VERSION, "changed": changed})
    else:
        click.echo(f"{bundle}: {'converted to' if changed else 'has'} schema version {SCHEMA_VERSION}")


def print_manifest(path: Path, manifest: Manifest, as_json: bool) -> None:
    """Print the size of a bundle, or its manifest as one JSON object."""
    if as_json:
        print_json(dataclasses.asdict(manifest))
        return
    size = sum(entry.bytes for entry in manifest.files.values())
    click.echo(f"{path}: {len(manifest.tasks)} tasks, {manifest.index.vectors} examples, {size / 1e6:.0f} MB")
