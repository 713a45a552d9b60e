"""The `edgecompose` command: parses, calls, prints. Results go to stdout, talk to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edgecompose import __version__, serialize
from edgecompose.bundle import files as bundles
from edgecompose.bundle.specs import BaseSpec
from edgecompose.chat import Chat
from edgecompose.cli.console import ErrorGroup, counting_bytes
from edgecompose.cli.options import (
    adapter_option,
    bundle_argument,
    device_option,
    form_option,
    generation_options,
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
    text_of,
)
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import EdgeComposeError
from edgecompose.formats.checkpoint import open_checkpoint
from edgecompose.formats.gguf import write_gguf_lora
from edgecompose.formats.merged_model import write_merged_model
from edgecompose.formats.onnx_adapter import write_onnx_adapter
from edgecompose.formats.peft import write_peft_folder
from edgecompose.request import Answer


class _Commands(ErrorGroup):
    """All commands; those that want many more modules are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the alphabet's order."""
        return sorted([*super().list_commands(ctx), "batch", "bundle", "eval", "serve"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name == "eval":
            from edgecompose.cli.evaluate import evaluate_examples

            return evaluate_examples
        if cmd_name == "bundle":
            from edgecompose.cli.bundle import bundle

            return bundle
        if cmd_name in ("batch", "serve"):
            from edgecompose.cli import serve as commands

            return commands.batch if cmd_name == "batch" else commands.serve
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgecompose")
def main() -> None:
    """Answer a prompt with a base model and a blend of LoRA adapters chosen by retrieval, offline."""


@main.command()
@bundle_argument
@prompt_argument
@retrieval_options
@adapter_option
@merge_options
@click.option("--choices", metavar="A,B,...", help="Score these options by log-likelihood instead of generating.")
@click.option("--choice", "more_choices", multiple=True, metavar="TEXT", help="One option, commas and all; repeatable.")
@generation_options
@click.option("--truncate", is_flag=True, help="Leave out the beginning of a prompt that is too long, and say so.")
@form_option
@click.option("--fuse", "--fold", is_flag=True, help="Fuse the blend into a copy of the base's weights (float bases).")
@click.option("--explain", is_flag=True, help="Show on stderr how the answer came about.")
@device_option
@json_option
def run(bundle: Path, prompt: str, explain: bool, device: str, as_json: bool, **options: Any) -> None:
    """Answer PROMPT ('-' reads standard input): retrieve, weigh, merge, generate.

    \b
    edgecompose run models/demo "Customer review: Great soup. Positive or negative? Answer:" --explain
    edgecompose run models/demo "Is it true?" --choices yes,no --json
    """
    text = read_prompt(prompt)
    with open_composer(bundle, device) as composer:
        request = request_of(composer, options)
        streams = not as_json
        with composer.generate(text, request) as generation:
            composer.release_embedder()
            for piece in generation:
                if streams:
                    _print_piece(piece)
            answer = generation.answer
    if streams:
        click.echo()
    _say_what_was_left_out(answer)
    if explain:
        _explain(answer)
    if as_json:
        print_json(serialize.answer_json(answer))


@main.command()
@bundle_argument
@click.option("--system", metavar="TEXT", help="Message that the conversation begins with.")
@click.option(
    "--route-by", type=click.Choice(["last", "first"]), default="last", show_default=True,
    help="The message that adapters are chosen by: the last, anew at each turn, or the first.",
)  # fmt: skip
@retrieval_options
@adapter_option
@merge_options
@generation_options
@click.option("--explain", is_flag=True, help="Show on stderr how each answer came about.")
@device_option
@json_option
def chat(bundle: Path, system: str | None, explain: bool, device: str, as_json: bool, **options: Any) -> None:
    """Talk: each line of standard input is a message; history is kept, adapters are chosen at each turn.

    Ctrl-C ends an answer, an empty line or the end of the input the conversation; /new begins another.

    \b
    edgecompose chat models/demo
    printf 'Hello!\\nWho are you?\\n' | edgecompose chat models/demo --json
    """
    with open_composer(bundle, device) as composer:
        talk = Chat(composer, request_of(composer, {**options, "truncate": True}), system=system)
        for line in _messages():
            if line == "/new":
                talk.reset()
                continue
            try:
                answer = talk.say(line, on_text=_ignore if as_json else _print_piece)
            except KeyboardInterrupt:
                click.echo()
                click.echo("edgecompose: the answer was ended", err=True)
                continue
            if as_json:
                print_json(serialize.answer_json(answer))
            else:
                click.echo()
            _say_what_was_left_out(answer)
            if explain:
                _explain(answer)


def _messages() -> Iterator[str]:
    """Lines of standard input up to an empty one, asked for at a terminal."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            click.echo("> ", nl=False, err=True)
        line = text_of(sys.stdin.buffer.readline()).strip()
        if not line:
            return
        yield line


def _say_what_was_left_out(answer: Answer) -> None:
    if answer.dropped_tokens:
        click.echo(f"edgecompose: the first {answer.dropped_tokens} tokens did not fit and were left out", err=True)


def _explain(answer: Answer) -> None:
    for line in serialize.explain_answer(answer):
        click.echo(line, err=True)


@main.command()
@bundle_argument
@prompt_argument
@retrieval_options
@no_sampling
@device_option
@json_option
def retrieve(bundle: Path, prompt: str, device: str, as_json: bool, **options: Any) -> None:
    """Show which tasks PROMPT resembles, without answering it.

    \b
    edgecompose retrieve models/demo "Do both sentences mean the same?"
    """
    text = read_prompt(prompt)
    with open_composer(bundle, device) as composer:
        retrieval = composer.retrieve(text, request_of(composer, options))
    if as_json:
        print_json({"prompt": text, **serialize.retrieval_json(retrieval)})
    else:
        print_lines(serialize.explain_retrieval(retrieval))


@main.command()
@bundle_argument
@prompt_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder or file to write.")
@click.option(
    "--format", "form", type=click.Choice(["peft", "onnx-adapter", "gguf", "merged"]), default="peft",
    show_default=True,
    help="A folder for PeftModel.from_pretrained, a file for onnxruntime.LoraAdapter, one for llama.cpp, or a model.",
)  # fmt: skip
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Of --format merged: the Hugging Face folder of the float base that the blend is written into.",
)  # fmt: skip
@retrieval_options
@no_sampling
@adapter_option
@merge_options
@device_option
@json_option
def compose(
    bundle: Path,
    prompt: str,
    output: Path,
    form: str,
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
    if (form == "merged") != (checkpoint is not None):
        raise click.UsageError("--format merged and --checkpoint FOLDER want each other; give both or neither")
    text = read_prompt(prompt)
    with open_composer(bundle, device) as composer:
        base, composition = composer.bundle.manifest.base, composer.compose(text, request_of(composer, options))
        if form == "peft":
            paths = write_peft_folder(composition.merged, output, base)
        elif form == "gguf":
            paths = [write_gguf_lora(composition.merged, output, base)]
        elif checkpoint is not None:
            paths = _write_merged(composition.merged, checkpoint, output, base)
        else:
            paths = [write_onnx_adapter(composition.merged, output)]
    if as_json:
        print_json({"prompt": text, "files": [str(p) for p in paths], **serialize.composition_json(composition)})
    else:
        print_lines([*serialize.explain_retrieval(composition.retrieval), f"written       {output}"])


def _write_merged(merged: MergedAdapter, folder: Path, output: Path, base: BaseSpec) -> list[Path]:
    checkpoint = open_checkpoint(folder)
    passes = 1 if checkpoint.is_recorded(base.identity) else 2  # to hash and to copy
    with counting_bytes("merging", passes * checkpoint.bytes) as advance:
        return write_merged_model(merged, checkpoint, output, base, advance=advance)


@main.command()
@bundle_argument
@click.option("--compatibility", is_flag=True, help="Add the cosine between the updates of every two adapters.")
@json_option
def inspect(bundle: Path, compatibility: bool, as_json: bool) -> None:
    """Show what is in a bundle: base, embedder, tasks, adapters, defaults.

    \b
    edgecompose inspect models/demo
    edgecompose inspect models/demo --compatibility
    """
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


@main.command()
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


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show versions, providers, the device that is chosen and why, and what is wrong.

    \b
    edgecompose doctor --json
    """
    found = serialize.doctor_json()
    if as_json:
        print_json(found)
    else:
        print_lines(serialize.describe_doctor(found))
    if found["problems"]:
        sys.exit(EdgeComposeError.exit_code)


def _print_piece(text: str) -> None:
    click.echo(text, nl=False)


def _ignore(text: str) -> None:
    """Swallow streamed text where the whole answer is printed at the end."""
