"""The commands that write bundles: `bundle`, `bundle add-task` and `bundle remove-task`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgecompose.cli.console import counting
from edgecompose_export.cli.options import ExportGroup, PathArgument, bits_of, bits_option, json_option
from edgecompose_export.cli.output import print_bundle, steps


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
    edgecompose-export bundle remove-task models/demo wic
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
    print_bundle(output, manifest, as_json)


@bundle.command("add-task")
@click.argument("directory", metavar="BUNDLE", type=PathArgument)
@click.argument("name")
@click.option(
    "--adapter",
    "adapter_path",
    type=PathArgument,
    required=True,
    help="Quantised adapter, PEFT or mlx_lm folder, or GGUF LoRA file.",
)
@click.option("--examples", "examples_file", type=PathArgument, required=True, help="JSONL of prompts.")
@bits_option
@json_option
def add_task_command(
    directory: Path, name: str, adapter_path: Path, examples_file: Path, bits: str, as_json: bool
) -> None:
    """Add a task to a bundle.

    \b
    edgecompose-export bundle add-task models/demo wic --adapter lora/wic --examples wic.jsonl
    """
    from edgecompose_export.bundles import add_task

    with counting("embedding", 1) as advance:
        manifest = add_task(
            directory,
            name,
            adapter=adapter_path,
            examples=examples_file,
            bits=bits_of(bits),
            advance=lambda done, of: advance(1 / of),
        )
    print_bundle(directory, manifest, as_json)


@bundle.command("remove-task")
@click.argument("directory", metavar="BUNDLE", type=PathArgument)
@click.argument("name")
@json_option
def remove_task_command(directory: Path, name: str, as_json: bool) -> None:
    """Remove a task from a bundle.

    \b
    edgecompose-export bundle remove-task models/demo wic
    """
    from edgecompose_export.bundles import remove_task

    with steps() as advance:
        advance("rebuilding the index")
        manifest = remove_task(directory, name)
    print_bundle(directory, manifest, as_json)
