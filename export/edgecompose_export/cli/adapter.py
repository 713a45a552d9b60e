"""The commands for adapters: `adapter` and `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgecompose.cli.bundle import bits_of, bits_option
from edgecompose_export.cli.options import PathArgument, json_option
from edgecompose_export.cli.output import print_result, steps, training_bar


@click.command()
@click.argument("source", type=PathArgument)
@click.option("--base", "base_folder", type=PathArgument, required=True, help="Exported base that the adapter is for.")
@click.option("-o", "--output", type=PathArgument, required=True, help="The .safetensors file to write.")
@bits_option
@json_option
def adapter(source: Path, base_folder: Path, output: Path, bits: str, as_json: bool) -> None:
    """Quantise a LoRA adapter: a PEFT folder, an mlx_lm folder, or a GGUF file of llama.cpp.

    Parts that cannot be converted are refused; the message names them.

    \b
    edgecompose-export adapter lora/snli --base build/base -o adapters/snli.safetensors
    edgecompose-export adapter snli.gguf --base build/base -o adapters/snli.safetensors
    """
    from edgecompose.adapters import convert_adapter
    from edgecompose_export.base.spec import read_base_spec

    with steps() as advance:
        advance("quantising")
        exported = convert_adapter(source, read_base_spec(base_folder), output, bits=bits_of(bits))
    errors = ", ".join(f"{name} {error:.3f}" for name, error in exported.errors.items())
    size = output.stat().st_size / 1e3
    text = f"{output}: rank {exported.spec.rank}, {bits} bits, {size:.0f} KB; relative error {errors}"
    print_result(text, exported.spec, as_json)


@click.command()
@click.argument("source", type=PathArgument)
@click.argument("examples_file", metavar="EXAMPLES.jsonl", type=PathArgument)
@click.option(
    "-o", "--output", type=PathArgument, required=True, help="PEFT folder to write; an unfinished run in it is resumed."
)
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Of every module.")
@click.option(
    "--alpha", type=click.IntRange(min=1), default=16, show_default=True, help="Updates are scaled by alpha/rank."
)
@click.option("--epochs", type=click.IntRange(min=1), default=2, show_default=True, help="Passes over the examples.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    default=1e-3,
    show_default=True,
    help="The largest, after warming up and before decaying.",
)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Examples a step.")
@click.option(
    "--max-length", type=click.IntRange(min=8), default=512, show_default=True, help="Longer examples are left out."
)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first so many examples.")
@click.option(
    "--prompt-form",
    type=click.Choice(["chat", "raw", "both"]),
    default="both",
    show_default=True,
    help="Train on the chat template, on the raw prompt, or on both alternately.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first factors and of the order."
)
@json_option
def train(source: Path, examples_file: Path, output: Path, limit: int | None, as_json: bool, **settings: Any) -> None:
    """Fine-tune a LoRA adapter on a task's examples; run it again to resume after an interruption.

    \b
    edgecompose-export train SmolLM2-135M-Instruct.Q4_1.gguf snli.jsonl -o lora/snli
    """
    from edgecompose.retrieval.examples import read_examples
    from edgecompose_export.base.source import open_base
    from edgecompose_export.training.batches import TrainSettings
    from edgecompose_export.training.train import train_adapter

    examples = read_examples(examples_file, limit=limit)
    base = open_base(source)
    with training_bar() as advance:
        report = train_adapter(base, examples, output, settings=TrainSettings(**settings), advance=advance)
    text = f"{output}: {report['steps']} steps on {report['examples']} examples, final loss {report['final_loss']:.3f}"
    print_result(text, report, as_json)
