"""The command `bundle`, which builds bundles, with those of `edgecompose bundle` that change one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgecompose.cli.bundle import add_task_command, print_manifest, remove_task_command
from edgecompose_export.cli.options import ExportGroup, PathArgument, json_option
from edgecompose_export.cli.output import steps


class _BundleGroup(ExportGroup):
    """`bundle RECIPE -o DIR` builds; `bundle add-task` and `bundle remove-task` change."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["build", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_BundleGroup, invoke_without_command=False)
def bundle() -> None:
    """Make a bundle from a recipe, or change one.

    \b
    edgecompose-export bundle models/demo.toml -o models/demo
    edgecompose-export bundle add-task models/demo wic --adapter lora/wic --examples wic.jsonl

    `add-task` and `remove-task` are those of `edgecompose bundle`.
    """


@bundle.command()
@click.argument("recipe", type=PathArgument)
@click.option("-o", "--output", type=PathArgument, required=True, help="Bundle directory to make.")
@click.option("--base", type=PathArgument, help="Exported base to take instead of the recipe's.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@json_option
def build(recipe: Path, output: Path, base: Path | None, force: bool, as_json: bool) -> None:
    """Make a bundle from a recipe (TOML).

    \b
    edgecompose-export bundle models/demo.toml -o models/demo
    """
    from edgecompose_export.bundles import build_bundle

    with steps() as advance:
        manifest = build_bundle(recipe, output, base=base, force=force, advance=advance)
    print_manifest(output, manifest, as_json)


bundle.add_command(add_task_command)
bundle.add_command(remove_task_command)
