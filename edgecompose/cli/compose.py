"""The command `compose`, which writes a blend for another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgecompose import serialize
from edgecompose.bundle.specs import BaseSpec
from edgecompose.cli.console import counting_bytes
from edgecompose.cli.options import (
    adapter_option,
    bundle_argument,
    device_option,
    json_option,
    merge_options,
    no_sampling,
    open_composer,
    print_json,
    print_lines,
    prompt_argument,
    read_prompt,
    request_of,
    retrieval_options,
)
from edgecompose.engine.merged import MergedAdapter
from edgecompose.formats.checkpoint import open_checkpoint
from edgecompose.formats.registry import FORMATS, WRITABLE, AdapterFormat

_WITH_WEIGHTS = ", ".join(row.name for row in WRITABLE if row.write_into is not None)


@click.command()
@bundle_argument
@prompt_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder or file to write.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice([row.name for row in WRITABLE]),
    default="peft",
    show_default=True,
    help=f"What to write: {'; '.join(f'{row.name}, {row.help}' for row in WRITABLE)}.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help=f"Of --format {_WITH_WEIGHTS}: the Hugging Face folder of the float base that the blend is written into.",
)
@retrieval_options
@no_sampling
@adapter_option
@merge_options
@device_option
@json_option
def compose(
    bundle: Path,
    prompt: str | None,
    output: Path,
    format_name: str,
    checkpoint: Path | None,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the blend for PROMPT for another program.

    \b
    edgecompose compose models/demo "A film review" -o blend
    edgecompose compose models/demo "A film review" --format onnx-adapter -o blend.onnx_adapter
    edgecompose compose models/demo "A film review" --format merged --checkpoint build/checkpoint -o model
    """
    row = FORMATS[format_name]
    if (row.write_into is not None) != (checkpoint is not None):
        raise click.UsageError(f"--checkpoint FOLDER goes with --format {_WITH_WEIGHTS}; give both or neither")
    text = read_prompt(prompt)
    if options["min_resemblance"] is None and not options["adapters"]:
        options["min_resemblance"] = 0.0  # whoever writes a blend wants one
    with open_composer(bundle, device) as composer:
        base, composition = composer.bundle.manifest.base, composer.compose(text, request_of(composer, options))
        paths = _write(row, composition.merged, output, base=base, checkpoint=checkpoint)
    if as_json:
        print_json({"prompt": text, "files": [str(p) for p in paths], **serialize.composition_json(composition)})
    else:
        print_lines([*serialize.explain_retrieval(composition.retrieval), f"written       {output}"])


def _write(
    row: AdapterFormat, merged: MergedAdapter, output: Path, *, base: BaseSpec, checkpoint: Path | None
) -> list[Path]:
    if row.write is not None:
        return row.write(merged, output, base)
    assert row.write_into is not None and checkpoint is not None, "the options were checked"
    weights = open_checkpoint(checkpoint)
    passes = 1 if weights.is_recorded(base.identity) else 2  # to hash and to copy
    with counting_bytes("merging", passes * weights.bytes) as advance:
        return row.write_into(merged, weights, output, base, advance)
