"""The commands that answer: `run`, `chat` and `retrieve`, which shows how adapters are chosen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edgecompose import serialize
from edgecompose.chat import Chat
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
from edgecompose.request import Answer


@click.command()
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
@click.option("--explain", is_flag=True, help="Explain the answer on standard error.")
@device_option
@json_option
def run(bundle: Path, prompt: str, explain: bool, device: str, as_json: bool, **options: Any) -> None:
    """Answer PROMPT ('-' reads standard input): retrieve, weigh, merge, generate.

    \b
    edgecompose run models/demo "Customer review: Great soup. Positive or negative? Answer:" --explain
    edgecompose run models/demo "Is it true?" --choices yes,no --json
    """
    prompt = read_prompt(prompt)
    with open_composer(bundle, device) as composer:
        request = request_of(composer, options)
        streams = not as_json
        with composer.generate(prompt, request) as generation:
            composer.release_embedder()
            for text in generation:
                if streams:
                    _print_chunk(text)
            answer = generation.answer
    if streams:
        click.echo()
    _say_what_was_left_out(answer)
    if explain:
        _explain(answer)
    if as_json:
        print_json(serialize.answer_json(answer))


@click.command()
@bundle_argument
@click.option("--system", metavar="TEXT", help="Message that the conversation begins with.")
@click.option(
    "--route-by",
    type=click.Choice(["last", "first"]),
    default="last",
    show_default=True,
    help="The message that adapters are chosen by: the last, anew at each turn, or the first.",
)
@retrieval_options
@adapter_option
@merge_options
@generation_options
@click.option("--explain", is_flag=True, help="Explain each answer on standard error.")
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
                answer = talk.say(line, on_text=_ignore if as_json else _print_chunk)
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


@click.command()
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


def _messages() -> Iterator[str]:
    """Lines of standard input up to an empty one, after a prompt at a terminal."""
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


def _print_chunk(text: str) -> None:
    click.echo(text, nl=False)


def _ignore(text: str) -> None:
    """Print nothing, where the whole answer is printed at its end."""
