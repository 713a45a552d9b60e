"""The commands for retrieval: `embedder` and `examples`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgecompose.cli.console import counting
from edgecompose_export.cli.options import PathArgument, json_option
from edgecompose_export.cli.output import print_result, steps


@click.command()
@click.argument("source", type=PathArgument)
@click.option("-o", "--output", type=PathArgument, required=True, help="Folder to write.")
@click.option(
    "--precision",
    type=click.Choice(["f32", "int8"]),
    default="int8",
    show_default=True,
    help="Weights of the encoder; int8 is smaller and runs on the CPU only.",
)
@click.option(
    "--ends",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Tokens at each end of a prompt that are also pooled by themselves; 0 for none.",
)
@json_option
def embedder(source: Path, output: Path, precision: Any, ends: int, as_json: bool) -> None:
    """Export a sentence encoder (sentence-transformers folder).

    \b
    edgecompose-export embedder all-MiniLM-L6-v2 -o build/embedder
    """
    from edgecompose_export.embedder import export_embedder

    with steps() as advance:
        spec = export_embedder(source, output, precision, ends=ends, advance=advance)
    text = f"{output}: {precision}, {spec.dimension} dimensions, {spec.pooling} pooling, cosine {spec.cosine:.4f}"
    print_result(text, spec, as_json)


@click.command()
@click.argument("tasks", nargs=-1, required=True, metavar="NAME=FILE.jsonl...")
@click.option("--embedder", "embedder_folder", type=PathArgument, required=True, help="Exported embedder.")
@click.option("-o", "--output", type=PathArgument, required=True, help="Folder to write.")
@click.option("--keep-text", is_flag=True, help="Write prompts and answers beside the vectors.")
@click.option(
    "--whiten/--no-whiten",
    default=True,
    show_default=True,
    help="Learn from the examples which directions tell tasks apart, and search by those.",
)
@json_option
def examples(
    tasks: tuple[str, ...], embedder_folder: Path, output: Path, keep_text: bool, whiten: bool, as_json: bool
) -> None:
    """Embed the prompts of tasks into an index; a task that is named twice gets the examples of both files.

    \b
    edgecompose-export examples snli=snli.jsonl boolq=boolq.jsonl --embedder build/embedder -o build/examples
    """
    from edgecompose.retrieval.examples import Example, read_examples
    from edgecompose_export.embedder import open_embedder
    from edgecompose_export.examples import write_examples

    named: dict[str, list[Example]] = {}
    for name, path in map(_named_path, tasks):
        named.setdefault(name, []).extend(read_examples(path))
    loaded, spec = open_embedder(embedder_folder)
    with counting("embedding", sum(map(len, named.values()))) as advance:
        table = write_examples(
            named, loaded, spec=spec, output=output, whiten=whiten, keep_text=keep_text, advance=advance
        )
    counts = ", ".join(f"{name} {span.examples}" for name, span in table.tasks.items())
    print_result(f"{output}: {table.index.vectors} vectors ({counts})", table, as_json)


def _named_path(pair: str) -> tuple[str, Path]:
    name, separator, path = pair.partition("=")
    if not separator or not name or not path:
        raise click.BadParameter(f"{pair!r} is not NAME=FILE.jsonl, for example snli=snli.train.jsonl")
    return name, Path(path)
