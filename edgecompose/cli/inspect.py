"""The commands that only read: `inspect`, `verify` and `doctor`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgecompose.bundle import files as bundles
from edgecompose.cli.console import counting_bytes
from edgecompose.cli.options import bundle_argument, json_option, open_composer, print_json, print_lines
from edgecompose.errors import EdgeComposeError


@click.command()
@bundle_argument
@click.option("--compatibility", is_flag=True, help="Add the cosine between the updates of every two adapters.")
@json_option
def inspect(bundle: Path, compatibility: bool, as_json: bool) -> None:
    """Show what is in a bundle: base, embedder, tasks, adapters, defaults.

    \b
    edgecompose inspect models/demo
    edgecompose inspect models/demo --compatibility
    """
    from edgecompose import serialize

    manifest = bundles.read_manifest(bundle)
    shown, lines = serialize.manifest_json(manifest), serialize.describe_manifest(manifest)
    if compatibility:
        names = sorted(manifest.adapters)
        with open_composer(bundle, "cpu") as composer:
            shown["compatibility"] = serialize.compatibility_json(names, composer.blends.inner_products(names))
        lines += ["", *serialize.describe_compatibility(shown["compatibility"])]
    if as_json:
        print_json(shown)
    else:
        print_lines(lines)


@click.command()
@bundle_argument
@json_option
def verify(bundle: Path, as_json: bool) -> None:
    """Check every file of a bundle against its manifest and list all faults at once.

    \b
    edgecompose verify models/demo
    """
    manifest = bundles.read_manifest(bundle)
    total = sum(entry.bytes for entry in manifest.files.values())
    with counting_bytes("hashing", total) as advance:
        problems = bundles.verify(bundle, advance=advance)
    if as_json:
        print_json({"bundle": str(bundle), "files": len(manifest.files), "bytes": total, "problems": problems})
    else:
        print_lines(problems or [f"{len(manifest.files)} files, {total / 1e6:.1f} MB: no fault found"])
    if problems:
        sys.exit(EdgeComposeError.exit_code)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show versions, providers, the device that is chosen and why, and what is wrong.

    \b
    edgecompose doctor --json
    """
    from edgecompose import serialize

    report = serialize.doctor_json()
    if as_json:
        print_json(report)
    else:
        print_lines(serialize.describe_doctor(report))
    if report["problems"]:
        sys.exit(EdgeComposeError.exit_code)
