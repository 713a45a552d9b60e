"""The `edgecompose` command: parses, calls, prints. Results go to stdout, talk to stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from edgecompose import __version__, report, scoreboard
from edgecompose import bundle as bundles
from edgecompose.blend import MergedAdapter
from edgecompose.chat import Chat
from edgecompose.composer import Composer, open_bundle
from edgecompose.console import ErrorGroup, counting, reading
from edgecompose.device import DeviceRequest, has_cuda_provider
from edgecompose.errors import EdgeComposeError, MergeError
from edgecompose.eval_charts import require_matplotlib
from edgecompose.eval_report import write_report
from edgecompose.evaluation import merge_examples, read_eval_examples
from edgecompose.evaluator import KINDS, MAX_TOKENS, Contender, evaluate, parse_contenders
from edgecompose.float_checkpoint import open_checkpoint
from edgecompose.gguf_lora import write_gguf_lora
from edgecompose.manifest import BaseSpec
from edgecompose.merged_model import write_merged_model
from edgecompose.methods import METHODS, MergeSettings
from edgecompose.onnx_adapter import write_onnx_adapter
from edgecompose.peft_folder import write_peft_folder
from edgecompose.request import Answer, Request
from edgecompose.sampling import Sampling
from edgecompose.server_settings import ServerSettings, read_key, server_names
from edgecompose.serving import run_server
from edgecompose.stdio import StdioServer

F = TypeVar("F", bound=Callable[..., Any])
_STANDARD_INPUT = "-"

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path, exists=False))
prompt_argument = click.argument("prompt")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Where to compute; cuda fails when it cannot be used, auto falls back to cpu and says why.",
)  # fmt: skip
form_option = click.option(
    "--raw/--chat", default=None,
    help="Send the prompt as it is, or in the chat template; by default as the bundle's adapters were trained.",
)  # fmt: skip


def retrieval_options(command: F) -> F:
    """Options of every command that retrieves and weighs."""
    options = [
        click.option("--top-n", type=click.IntRange(min=1), help="Neighbours to retrieve (N)."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus over tasks (p)."),
        click.option(
            "--temperature", type=click.FloatRange(0, min_open=True),
            help="T of exp(-(1-cos)/T): smaller trusts the nearest neighbours more.",
        ),
        click.option(
            "--size-correction", type=click.FloatRange(0, 1),
            help="Power of a task's number of examples that its votes are divided by.",
        ),
        click.option(
            "--shortcut", type=click.FloatRange(0, 1, min_open=True),
            help="Share of the likeliest task at which it is taken alone.",
        ),
        click.option(
            "--fallback", type=click.FloatRange(0, 1),
            help="Share of the likeliest task below which the base answers alone.",
        ),
        click.option("--exclude", multiple=True, metavar="TASK", help="Leave a task out; repeatable."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


adapter_option = click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME=WEIGHT",
    help="Compose by hand instead of by retrieval; repeatable.",
)  # fmt: skip


def merge_options(command: F) -> F:
    """Options of every command that merges."""
    options = [
        click.option("--method", type=click.Choice(list(METHODS)), help="How adapters are merged."),
        click.option("--density", type=click.FloatRange(0, 1, min_open=True), help="Share of entries the prunes keep."),
        click.option("--majority-sign", type=click.Choice(["total", "frequency"]), help="How ties elects a sign."),
        click.option("--rank", type=click.IntRange(min=1), help="Largest rank that svd leaves."),
        click.option(
            "--energy", type=click.FloatRange(0, 1, min_open=True), help="Share of the squared norm that svd keeps."
        ),
        click.option("--dare-seed", type=click.IntRange(min=0), help="Which entries the dare methods keep."),
        click.option(
            "--norm-guard/--no-norm-guard", default=None, help="Rescale the blend to the mean norm of its parts."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def generation_options(command: F) -> F:
    """Options of every command that generates."""
    options = [
        click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Text that the answer ends before; repeatable."),
        click.option("--sample", is_flag=True, help="Draw tokens at random instead of taking the likeliest."),
        click.option(
            "--sample-temperature", type=click.FloatRange(0), default=0.8, show_default=True,
            help="Of --sample: divides the logits.",
        ),
        click.option(
            "--sample-top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95, show_default=True,
            help="Of --sample: the fewest tokens whose probabilities reach it.",
        ),
        click.option("--top-k", type=click.IntRange(0), default=0, help="Of --sample: the k likeliest tokens; 0 all."),
        click.option(
            "--min-p", type=click.FloatRange(0, 1), default=0.0,
            help="Of --sample: tokens at least that times as likely as the likeliest.",
        ),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of --sample."),
        click.option(
            "--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0,
            help="Above 1, what was said before is less likely; with or without --sample.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _parse_methods(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(","))
    unknown = [name for name in names if name not in (*KINDS, *METHODS)]
    if unknown or len(set(names)) < len(names):
        raise click.BadParameter(
            f"{value!r} names {repr(unknown[0]) + ', which is unknown' if unknown else 'one twice'}; "
            f"use some of {', '.join((*KINDS, *METHODS))}"
        )
    return names


@click.group(cls=ErrorGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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
@click.option("--fold", is_flag=True, help="Write the blend into a copy of the base's weights (float bases only).")
@click.option("--explain", is_flag=True, help="Show on stderr how the answer came about.")
@device_option
@json_option
def run(bundle: Path, prompt: str, explain: bool, device: str, as_json: bool, **options: Any) -> None:
    """Answer PROMPT ('-' reads standard input): retrieve, weigh, merge, generate.

    \b
    edgecompose run models/demo "Was this review positive or negative? I loved every minute." --explain
    edgecompose run models/demo "Is it true?" --choices yes,no --json
    """
    text = _read_prompt(prompt)
    with _open(bundle, device) as composer:
        request = _request(composer, options)
        streams = not as_json
        answer = composer.run(text, request, on_text=_print_piece if streams else _ignore)
    if streams:
        click.echo()
    _say_what_was_left_out(answer)
    if explain:
        _explain(answer)
    if as_json:
        _print_json(report.answer_json(answer))


@main.command()
@bundle_argument
@click.option("--system", metavar="TEXT", help="Message that the conversation begins with.")
@click.option(
    "--query", type=click.Choice(["last", "first"]), default="last", show_default=True,
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
    with _open(bundle, device) as composer:
        talk = Chat(composer, _request(composer, {**options, "truncate": True}), system=system)
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
                _print_json(report.answer_json(answer))
            else:
                click.echo()
            _say_what_was_left_out(answer)
            if explain:
                _explain(answer)


@main.command()
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; others want a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with a key that callers have to send as a bearer token; also the variable EDGECOMPOSE_API_KEY.",
)
@click.option("--allow-host", multiple=True, metavar="NAME", help="Another name of this server; repeatable.")
@click.option("--allow-origin", multiple=True, metavar="URL", help="A site whose pages may call it; repeatable.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Answers written at once.")
@click.option(
    "--queue", type=click.IntRange(0), default=16, show_default=True, help="Requests that wait; more get 429."
)
@click.option("--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Longest answer.")
@click.option("--stdio", is_flag=True, help="Answer JSON-RPC lines on standard input instead, for a parent process.")
@device_option
def serve(bundle: Path, device: str, stdio: bool, **options: Any) -> None:
    """Serve the OpenAI API, and a page to try it on, to programs on this machine.

    \b
    edgecompose serve models/demo
    edgecompose serve models/demo --stdio
    """
    with _open(bundle, device) as composer:
        if stdio:
            composer.warm_up()
            StdioServer(composer, sys.stdin.buffer, _write_line, max_tokens=options["max_tokens"]).serve()
            return
        settings = ServerSettings(
            hosts=server_names(options["host"], options["allow_host"]), origins=options["allow_origin"],
            key=read_key(options["api_key_file"]), workers=options["workers"], queue=options["queue"],
            max_tokens=options["max_tokens"],
        )  # fmt: skip
        run_server(composer, settings, host=options["host"], port=options["port"], ready=_say_where)


def _say_where(url: str) -> None:
    click.echo(f"edgecompose: serving at {url} (Ctrl-C ends it)", err=True)


def _write_line(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _messages() -> Iterator[str]:
    """Lines of standard input up to an empty one, asked for at a terminal."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            click.echo("> ", nl=False, err=True)
        line = _text_of(sys.stdin.buffer.readline()).strip()
        if not line:
            return
        yield line


def _say_what_was_left_out(answer: Answer) -> None:
    if answer.dropped_tokens:
        click.echo(f"edgecompose: the first {answer.dropped_tokens} tokens did not fit and were left out", err=True)


def _explain(answer: Answer) -> None:
    for line in report.explain_answer(answer):
        click.echo(line, err=True)


@main.command()
@bundle_argument
@prompt_argument
@retrieval_options
@device_option
@json_option
def retrieve(bundle: Path, prompt: str, device: str, as_json: bool, **options: Any) -> None:
    """Show which tasks PROMPT resembles, without answering it.

    \b
    edgecompose retrieve models/demo "Do both sentences mean the same?"
    """
    text = _read_prompt(prompt)
    with _open(bundle, device) as composer:
        retrieval = composer.retrieve(text, _request(composer, options))
    if as_json:
        _print_json({"prompt": text, **report.retrieval_json(retrieval)})
    else:
        _print_lines(report.explain_retrieval(retrieval))


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
    text = _read_prompt(prompt)
    with _open(bundle, device) as composer:
        base, composition = composer.bundle.manifest.base, composer.compose(text, _request(composer, options))
        if form == "peft":
            paths = write_peft_folder(composition.merged, output, base=base.source)
        elif form == "gguf":
            paths = [write_gguf_lora(composition.merged, output, base)]
        elif checkpoint is not None:
            paths = _write_merged(composition.merged, checkpoint, output, base)
        else:
            paths = [write_onnx_adapter(composition.merged, output)]
    if as_json:
        _print_json({"prompt": text, "files": [str(p) for p in paths], **report.composition_json(composition)})
    else:
        _print_lines([*report.explain_retrieval(composition.retrieval), f"written       {output}"])


def _write_merged(merged: MergedAdapter, folder: Path, output: Path, base: BaseSpec) -> list[Path]:
    checkpoint = open_checkpoint(folder)
    passes = 1 if checkpoint.is_recorded(base.identity) else 2  # to hash and to copy
    with reading("merging", passes * checkpoint.bytes) as advance:
        return write_merged_model(merged, checkpoint, output, base, advance=advance)


@main.command("eval")
@bundle_argument
@click.argument("data", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--methods",
    callback=_parse_methods,
    default="base,own,retrieved",
    show_default=True,
    metavar="A,B,...",
    help="What is compared: base, own (the task's adapter), top1, uniform, retrieved, and any merge method.",
)
@click.option(
    "--adapter",
    "by_hand",
    multiple=True,
    metavar="NAME=WEIGHT",
    help="Compare a blend of these as well, 'by hand', the same for every example; repeatable.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Examples of each task, the first ones.")
@click.option("--exclude-own", is_flag=True, help="Leave an example's own task out of retrieval, as if it were unseen.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=MAX_TOKENS, show_default=True, help="Of free text.")
@form_option
@click.option(
    "--outcomes",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep every answer in this file; run again, and only what is missing is computed.",
)
@click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write a report with charts to this folder (wants edgecompose[report]), and --outcomes there.",
)
@retrieval_options
@merge_options
@device_option
@json_option
def evaluate_examples(
    bundle: Path,
    data: tuple[Path, ...],
    methods: tuple[str, ...],
    by_hand: tuple[str, ...],
    limit: int | None,
    exclude_own: bool,
    outcomes: Path | None,
    report_folder: Path | None,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how often answers are right on your own examples: DATA files of JSON lines.

    A line has prompt and answer; choices (the answer is one of them) or aliases (other right answers) if you like;
    task, by default the file's name up to its first dot.

    \b
    edgecompose eval models/demo questions.jsonl --methods base,own,top1,retrieved
    edgecompose eval models/demo questions.jsonl --exclude-own --report report
    """
    examples = merge_examples((read_eval_examples(path) for path in data), limit)
    if report_folder is not None:
        require_matplotlib()
        outcomes = outcomes or report_folder / "outcomes.jsonl"
    with _open(bundle, device) as composer:
        request = _request(composer, options)
        contenders = parse_contenders(methods, request, exclude_own)
        weights = _parse_weights(by_hand)
        if weights is not None:
            contenders.insert(0, Contender("by hand", "fixed", dataclasses.replace(request, weights=weights)))
        with counting("answering", len(examples) * len(contenders)) as advance:
            found = evaluate(composer, examples, contenders, outcomes=outcomes, advance=advance)
        settings = scoreboard.settings_json(composer.bundle.manifest, composer.device, contenders)
    settings |= {"files": [path.name for path in data], "limit": limit}
    summary = found.summary()
    result = scoreboard.evaluation_json(summary, settings)
    pages = [] if report_folder is None else write_report(found, summary, result, report_folder)
    if as_json:
        _print_json(result)
    else:
        _print_lines([*scoreboard.describe_evaluation(result), *(f"written       {path}" for path in pages[:1])])


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
    shown, lines = report.manifest_json(manifest), report.describe_manifest(manifest)
    if compatibility:
        names = sorted(manifest.adapters)
        with _open(bundle, "cpu") as composer:
            shown["compatibility"] = report.compatibility_json(names, composer.inner_products(names))
        lines += ["", *report.describe_compatibility(shown["compatibility"])]
    if as_json:
        _print_json(shown)
    else:
        _print_lines(lines)


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
    with reading("hashing", total) as advance:
        problems = bundles.verify(bundle, advance=advance)
    if as_json:
        _print_json({"bundle": str(bundle), "files": len(manifest.files), "bytes": total, "problems": problems})
    else:
        _print_lines(problems or [f"{len(manifest.files)} files, {total / 1e6:.1f} MB: no fault found"])
    if problems:
        sys.exit(EdgeComposeError.exit_code)


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show versions, providers, the device that is chosen and why, and what is wrong.

    \b
    edgecompose doctor --json
    """
    found = report.doctor_json()
    if as_json:
        _print_json(found)
    else:
        _print_lines(report.describe_doctor(found))
    if found["problems"]:
        sys.exit(EdgeComposeError.exit_code)


def _open(bundle: Path, device: str) -> Composer:
    composer = open_bundle(bundle, device=cast(DeviceRequest, device))
    if device == "auto" and composer.device.kind == "cpu" and has_cuda_provider():
        click.echo(f"edgecompose: {composer.device.reason}", err=True)
    return composer


def _request(composer: Composer, options: dict[str, Any]) -> Request:
    """The request that a command's options describe."""
    given = {**options, "seed": options.get("dare_seed")}
    names = [item.name for item in dataclasses.fields(MergeSettings)]
    merge = dataclasses.replace(
        composer.default_merge, **{name: given[name] for name in names if given.get(name) is not None}
    )
    return Request(
        weights=_parse_weights(options.get("adapters", ())), exclude=options["exclude"],
        neighbours=options["top_n"], temperature=options["temperature"], nucleus=options["top_p"], merge=merge,
        max_tokens=options.get("max_tokens"), sampling=_sampling(options), stop=options.get("stop", ()),
        query=options.get("query", "last"), overflow="truncate" if options.get("truncate") else "refuse",
        choices=(*_parse_choices(options.get("choices")), *options.get("more_choices", ())),
        raw=options.get("raw"), attachment="fold" if options.get("fold") else "attach",
    )  # fmt: skip


def _sampling(options: dict[str, Any]) -> Sampling | None:
    """How tokens are drawn; None for the likeliest, always."""
    penalty = options.get("repetition_penalty", 1.0)
    if options.get("sample"):
        return Sampling(
            options["sample_temperature"], options["sample_top_p"], options["seed"], options["top_k"],
            options["min_p"], penalty,
        )  # fmt: skip
    return Sampling(temperature=0, repetition_penalty=penalty) if penalty != 1 else None


def _parse_weights(pairs: tuple[str, ...]) -> dict[str, float] | None:
    if not pairs:
        return None
    weights: dict[str, float] = {}
    for pair in pairs:
        name, separator, value = pair.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise click.BadParameter(f"{pair!r} is not NAME=WEIGHT, for example snli=0.7", param_hint="--adapter")
        if name in weights:
            raise MergeError(f"adapter '{name}' is named twice; add its weights up instead")
        weights[name] = weight
    return weights


def _parse_choices(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    choices = tuple(choice.strip() for choice in text.split(","))
    if not all(choices):
        raise click.BadParameter("a choice is empty; give them as A,B,C", param_hint="--choices")
    return choices


def _read_prompt(prompt: str) -> str:
    if prompt != _STANDARD_INPUT:
        return prompt
    return _text_of(sys.stdin.buffer.read()).rstrip("\n")


def _text_of(content: bytes) -> str:
    """What standard input says."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EdgeComposeError(f"standard input is not UTF-8 ({error}); give UTF-8 text") from error


def _print_piece(text: str) -> None:
    click.echo(text, nl=False)


def _ignore(text: str) -> None:
    """Swallow streamed text where the whole answer is printed at the end."""


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))
