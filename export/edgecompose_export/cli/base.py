"""The commands that read a base: `base` and `checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgecompose_export.cli.options import PathArgument, json_option
from edgecompose_export.cli.output import print_result, steps


@click.command()
@click.argument("source", type=PathArgument)
@click.option("-o", "--output", type=PathArgument, required=True, help="Folder to write.")
@click.option(
    "--precision",
    type=click.Choice(["source", "auto", "int8", "int4", "fp16", "fp32"]),
    help="Weights of the decoder. source: as the file has them, each tensor in its own type (default for a GGUF file). "
    "auto: 4 and 8 bits, 4 where a module loses least (default for a folder of less than 3 billion weights, int8 "
    "above). fp16 computes in float32.",
)
@click.option(
    "--accept-distance", is_flag=True, help="Keep a base that is more than 0.01 nats from the values of its file."
)
@json_option
def base(source: Path, output: Path, precision: Any, accept_distance: bool, as_json: bool) -> None:
    """Export a base model (Hugging Face folder, or GGUF file with all its shards) with adapter slots.

    \b
    edgecompose-export base SmolLM2-135M-Instruct.Q4_1.gguf -o build/base
    """
    from edgecompose_export.base.export import export_base

    with steps() as advance:
        spec = export_base(source, output, precision, accept_distance=accept_distance, advance=advance)
    distance = spec.distance
    quality = (
        ""
        if distance is None
        else (
            f"; KL {distance.kl:.5f}, top-1 {distance.top1:.1%} against the values of the file, "
            f"{distance.nll:.3f} nats a token of the calibration prompts ({distance.nll_float:.3f} with those values)"
        )
    )
    text = f"{output}: {spec.architecture}, {spec.precision}, {spec.layers} layers, context {spec.context}{quality}"
    print_result(text, spec, as_json)


@click.command()
@click.argument("source", type=PathArgument)
@click.option("-o", "--output", type=PathArgument, required=True, help="Folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the weights.",
)
@json_option
def checkpoint(source: Path, output: Path, dtype: Any, as_json: bool) -> None:
    """Write a base's float weights as a Hugging Face folder, for `edgecompose compose --format merged`.

    \b
    edgecompose-export checkpoint SmolLM2-135M-Instruct.Q4_1.gguf -o build/checkpoint
    """
    from edgecompose_export.base.checkpoint import write_checkpoint
    from edgecompose_export.base.source import open_base

    with steps() as advance:
        advance("opening the base")
        base = open_base(source)
        advance("writing the weights")
        identity = write_checkpoint(base, output, dtype)
    size = sum(path.stat().st_size for path in output.iterdir())
    result = {"folder": str(output), "dtype": dtype, "base": identity, "bytes": size}
    print_result(f"{output}: {dtype}, {size / 1e6:.0f} MB, of base {identity[:12]}", result, as_json)
