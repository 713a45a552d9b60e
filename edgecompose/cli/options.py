"""What commands share: options, the request that they describe, reading prompts, printing results."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from edgecompose.composer import Composer, open_bundle
from edgecompose.engine.device import DeviceRequest, has_cuda_provider
from edgecompose.errors import EdgeComposeError, MergeError
from edgecompose.generation.sampler import Sampling
from edgecompose.merging.methods import METHODS, MergeSettings
from edgecompose.request import Request

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
        click.option(
            "--top-k", type=click.IntRange(0), default=0, show_default=True,
            help="Of --sample: the k likeliest tokens; 0 all.",
        ),
        click.option(
            "--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True,
            help="Of --sample: tokens at least that times as likely as the likeliest.",
        ),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of --sample."),
        click.option(
            "--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
            help="Above 1, what was said before is less likely; with or without --sample.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def open_composer(bundle: Path, device: str) -> Composer:
    """The bundle on the device, with a word on stderr where that is not the one that could be hoped for."""
    composer = open_bundle(bundle, device=cast(DeviceRequest, device))
    if device == "auto" and composer.device.kind == "cpu" and has_cuda_provider():
        click.echo(f"edgecompose: {composer.device.reason}", err=True)
    return composer


def request_of(composer: Composer, options: dict[str, Any]) -> Request:
    """The request that a command's options describe."""
    given = {**options, "seed": options.get("dare_seed")}
    names = [item.name for item in dataclasses.fields(MergeSettings)]
    merge = dataclasses.replace(
        composer.default_merge, **{name: given[name] for name in names if given.get(name) is not None}
    )
    return Request(
        weights=parse_weights(options.get("adapters", ())), exclude=options["exclude"],
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


def parse_weights(pairs: tuple[str, ...]) -> dict[str, float] | None:
    """Weights by adapter from `--adapter` options, None where there is none."""
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


def read_prompt(prompt: str) -> str:
    """A prompt as it is given, or standard input."""
    if prompt != _STANDARD_INPUT:
        return prompt
    return text_of(sys.stdin.buffer.read()).rstrip("\n")


def text_of(content: bytes) -> str:
    """What standard input says."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EdgeComposeError(f"standard input is not UTF-8 ({error}); give UTF-8 text") from error


def print_lines(lines: list[str]) -> None:
    """A result for people."""
    for line in lines:
        click.echo(line)


def print_json(value: dict[str, Any]) -> None:
    """A result for programs, in one line."""
    click.echo(json.dumps(value, ensure_ascii=False))
