"""What commands share: options, the request that they describe, reading prompts, printing results."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import click

from edgecompose.bundle.specs import KVCacheType
from edgecompose.cli.terminal.streams import json_line, read_input
from edgecompose.errors import MergeError
from edgecompose.merging.methods import METHODS, require_parameters
from edgecompose.settings import (
    MOST_DRAFTS,
    MergeSettings,
    RetrievalSettings,
    Sampling,
    Setting,
    names_of,
    settings_of,
)

if TYPE_CHECKING:  # the commands that only read a bundle work where ONNX Runtime does not
    from edgecompose.composer import Composer
    from edgecompose.engine.device import DeviceRequest
    from edgecompose.request import Request

F = TypeVar("F", bound=Callable[..., Any])
_STANDARD_INPUT = "-"

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path, exists=False))
prompt_argument = click.argument("prompt", required=False)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute; cuda fails when it cannot be used, auto falls back to cpu and says why.",
)
kv_cache_option = click.option(
    "--kv-cache",
    type=click.Choice(list(get_args(KVCacheType))),
    default="float32",
    show_default=True,
    help="Keys and values of tokens that were read and written. int8 takes a quarter of the memory; 'inspect' shows "
    "which the base has, and how near they are. CPU only.",
)
prompt_cache_option = click.option(
    "--prompt-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep prompts that were read in this file, so that the next start answers them, and those that begin alike, "
    "sooner. It holds their texts. CPU only.",
)
prompt_cache_bytes_option = click.option(
    "--prompt-cache-bytes",
    type=click.IntRange(1),
    default=1 << 30,
    show_default=True,
    help="Largest file of --prompt-cache; what was used longest ago leaves first.",
)
form_option = click.option(
    "--raw/--chat",
    default=None,
    help="Send the prompt as it is, or in the chat template; by default as the bundle's adapters were trained, where "
    "the prompt resembles their examples.",
)
special_tokens_option = click.option(
    "--special-tokens/--no-special-tokens",
    default=None,
    help="Read special tokens that are written in the prompt as such, or as text; by default as such with --raw.",
)


adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=WEIGHT",
    help="Compose by hand instead of by retrieval; repeatable.",
)

#: Options that had another name or meaning until 0.1. For one release they are refused with the new name.
_RENAMED = {
    "--top-n": "--neighbours",
    "--size-correction": "--class-size-exponent",
    "--sample-temperature": "--temperature",
    "--sample-top-p": "--top-p",
    "--query": "--route-by",
    "--outcomes": "--answer-cache",
}
#: Names of sampling options, for commands that do not sample.
_MOVED = {"--temperature": "--routing-temperature", "--top-p": "--nucleus"}


def retrieval_options(command: F) -> F:
    """Options of every command that retrieves and weighs."""
    exclude = click.option("--exclude", multiple=True, metavar="TASK", help="Leave a task out; repeatable.")
    return _refuse_renamed(_RENAMED)(_settings_options(RetrievalSettings)(exclude(command)))


def merge_options(command: F) -> F:
    """Options of every command that merges."""
    return _settings_options(MergeSettings)(command)


def generation_options(command: F) -> F:
    """Options of every command that generates."""
    sample = click.option(
        "--sample", is_flag=True, help="Draw tokens at random; the options below do so as well, --seed included."
    )
    for option in (
        _settings_options(Sampling, defaults=True),
        sample,
        click.option("--stop", multiple=True, metavar="TEXT", help="Text that the answer ends before; repeatable."),
        click.option(
            "--drafts",
            type=click.IntRange(0, MOST_DRAFTS),
            help="Tokens that are guessed for one pass at most, 0 for none; the answer is the same.",
        ),
        click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens."),
    ):
        command = option(command)
    return command


def no_sampling(command: F) -> F:
    """Refuse the names that sampling took over from retrieval, on commands that retrieve and do not sample."""
    return _refuse_renamed(_MOVED)(command)


def _refuse_renamed(names: Mapping[str, str]) -> Callable[[F], F]:
    """Hidden options that refuse old names."""

    def add(command: F) -> F:
        for old, new in names.items():
            command = click.option(old, hidden=True, expose_value=False, callback=_refusal(old, new))(command)
        return command

    return add


def _refusal(old: str, new: str) -> Callable[[click.Context, click.Parameter, object], None]:
    def refuse(context: click.Context, parameter: click.Parameter, value: object) -> None:
        if value is not None:
            raise click.UsageError(f"{old} is called {new} now; use that name", context)

    return refuse


def _settings_options(kind: type[Any], *, defaults: bool = False) -> Callable[[F], F]:
    """One option a field of a class of settings; None where a caller does not use it.

    Args:
        defaults: the help shows the defaults of the class, which hold where no bundle has its own.
    """
    hints = get_type_hints(kind)

    def add(command: F) -> F:
        for name, item in reversed(settings_of(kind).items()):
            flag = f"--{name.replace('_', '-')}"
            value = getattr(kind(), name)
            shown = f"{item.help}  [default: {value}]" if defaults and value is not None else item.help
            flags = f"{flag}/--no-{flag[2:]}" if hints[name] is bool else flag
            option_type = None if hints[name] is bool else _option_type(name, hints[name], item)
            command = click.option(flags, type=option_type, default=None, help=shown)(command)
        return command

    return add


def _option_type(name: str, hint: Any, item: Setting) -> click.ParamType[Any]:
    if name == "method":
        return click.Choice(list(METHODS))
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    low, is_open = (item.low, False) if item.above is None else (item.above, True)
    if hint is int or int in get_args(hint):
        return click.IntRange(min=None if low is None else int(low))
    return click.FloatRange(min=low, min_open=is_open, max=item.high)


def open_composer(bundle: Path, device: str, *, in_memory: bool = False, kv_cache: str = "float32") -> Composer:
    """The bundle on the device; a note on stderr says where auto fell back to the CPU."""
    from edgecompose.composer import open_bundle
    from edgecompose.engine.device import has_cuda_provider

    composer = open_bundle(
        bundle,
        device=cast("DeviceRequest", device),
        in_memory=in_memory,
        kv_cache=cast("KVCacheType", kv_cache),
    )
    if device == "auto" and composer.device.kind == "cpu" and has_cuda_provider():
        click.echo(f"edgecompose: {composer.device.reason}", err=True)
    return composer


@contextmanager
def kept_prompts(composer: Composer, path: Path | None, limit: int) -> Iterator[None]:
    """Read the prompts of a file before the block, if there is one, and write them after it, if it ends well.

    Raises:
        GenerationError: the file cannot be read, or is damaged.
        OSError: it cannot be written.
    """
    if path is None:
        yield
        return
    if path.exists() and composer.load_prompts(path, limit=limit) is None:
        click.echo(
            f"edgecompose: '{path}' is of another base, KV cache, ONNX Runtime or processor, and is replaced",
            err=True,
        )
    try:
        yield
    except click.exceptions.Exit:  # how a server ends
        composer.save_prompts(path, limit=limit)
        raise
    composer.save_prompts(path, limit=limit)


def request_of(composer: Composer, options: Mapping[str, Any], *, methods: Collection[str] = ()) -> Request:
    """The request that a command's options describe.

    Args:
        methods: merge methods that are used beside the one of the options, as `eval` does.

    Raises:
        click.UsageError: an option has no effect beside the others.
    """
    from edgecompose.request import Request

    defaults = composer.bundle.manifest.defaults
    retrieval, merge, sampling = (_used(options, kind) for kind in (RetrievalSettings, MergeSettings, Sampling))
    weights = parse_weights(options.get("adapters", ()))
    choices = (*_parse_choices(options.get("choices")), *options.get("more_choices", ()))
    merge_settings = dataclasses.replace(defaults.merge, **merge)
    if weights is not None:
        _refuse({**retrieval, "exclude": options["exclude"]}, "beside --adapter, which composes by hand")
    if choices:
        written = {name: options.get(name) for name in ("max_tokens", "stop", "sample", "drafts")}
        _refuse({**sampling, **written}, "beside --choices, which are scored and not written")
    if sampling.get("temperature") == 0:
        drawn = {name: value for name, value in sampling.items() if name not in ("temperature", "repetition_penalty")}
        _refuse(drawn, "at --temperature 0, which is greedy")
    try:
        require_parameters(merge, {merge_settings.method, *methods})
    except MergeError as error:
        raise click.UsageError(str(error)) from error
    return Request(
        weights=weights,
        exclude=options["exclude"],
        retrieval=dataclasses.replace(defaults.retrieval, **retrieval) if retrieval else None,
        merge=merge_settings,
        max_tokens=options.get("max_tokens"),
        sampling=_sampling(sampling, bool(options.get("sample"))),
        stop=options.get("stop", ()),
        route_by=options.get("route_by", "last"),
        overflow="truncate" if options.get("truncate") else "refuse",
        choices=choices,
        raw=options.get("raw"),
        special_tokens=options.get("special_tokens"),
        attachment="fuse" if options.get("fuse") else "attach",
        drafts=options.get("drafts"),
    )


def _used(options: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """The settings of a class that the caller named."""
    return {name: options[name] for name in names_of(kind) if options.get(name) is not None}


def _refuse(values: Mapping[str, Any], where: str) -> None:
    """Refuse options that have no effect."""
    idle = [f"--{name.replace('_', '-')}" for name, value in values.items() if value not in (None, (), False)]
    if idle:
        raise click.UsageError(f"{', '.join(idle)} has no effect {where}; leave it out")


def _sampling(values: Mapping[str, Any], sample: bool) -> Sampling | None:
    """How tokens are drawn; None is greedy. A penalty alone does not draw."""
    if sample or set(values) - {"repetition_penalty"}:
        return Sampling(**values)
    return Sampling(temperature=0, **values) if values else None


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


def read_prompt(prompt: str | None) -> str:
    """The prompt of the argument, or of standard input where that is '-' or missing.

    Raises:
        click.UsageError: there is no argument, and standard input is a terminal or empty.
    """
    if prompt is not None and prompt != _STANDARD_INPUT:
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("PROMPT is missing; give it as an argument, or pipe text into the command")
    text = read_input()
    if prompt is None and not text:
        raise click.UsageError("PROMPT is missing and standard input is empty; give the prompt as an argument")
    return text


def print_lines(lines: list[str]) -> None:
    """Print a result as text."""
    for line in lines:
        click.echo(line)


def print_json(value: dict[str, Any]) -> None:
    """Print a result as one line of JSON."""
    click.echo(json_line(value))
