"""The commands that answer: `run`, and `retrieve`, which shows how adapters are chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from edgecompose import serialize
from edgecompose.cli.options import (
    adapter_option,
    bundle_argument,
    device_option,
    form_option,
    generation_options,
    json_option,
    kept_prompts,
    kv_cache_option,
    merge_options,
    no_sampling,
    open_composer,
    print_json,
    print_lines,
    prompt_argument,
    prompt_cache_bytes_option,
    prompt_cache_option,
    read_prompt,
    request_of,
    retrieval_options,
    special_tokens_option,
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
@special_tokens_option
@click.option("--fuse", "--fold", is_flag=True, help="Fuse the blend into a copy of the base's weights (float bases).")
@click.option("--explain", is_flag=True, help="Explain the answer on standard error.")
@device_option
@kv_cache_option
@prompt_cache_option
@prompt_cache_bytes_option
@json_option
def run(
    bundle: Path, prompt: str | None, explain: bool, device: str, kv_cache: str, as_json: bool, **options: Any
) -> None:
    """Answer PROMPT ('-' reads standard input): retrieve, weigh, merge, generate.

    Without PROMPT the text that is piped into the command is the prompt; beside PROMPT it is not read.

    \b
    edgecompose run models/demo "Customer review: Great soup. Positive or negative? Answer:" --explain
    edgecompose run models/demo "Is it true?" --choices yes,no --json
    """
    text = read_prompt(prompt)
    file, limit = options.pop("prompt_cache"), options.pop("prompt_cache_bytes")
    with open_composer(bundle, device, kv_cache=kv_cache) as composer, kept_prompts(composer, file, limit):
        request = dataclasses.replace(request_of(composer, options), prompt_cache=file is not None)
        streams = not as_json
        with composer.generate(text, request) as generation:
            composer.release_embedder()
            for chunk in generation:
                if streams:
                    click.echo(chunk, nl=False)
            answer = generation.answer
    if streams:
        click.echo()
    print_notes(answer, explain=explain)
    if as_json:
        print_json(serialize.answer_json(answer))


@click.command()
@bundle_argument
@prompt_argument
@retrieval_options
@no_sampling
@device_option
@json_option
def retrieve(bundle: Path, prompt: str | None, device: str, as_json: bool, **options: Any) -> None:
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


def print_notes(answer: Answer, *, explain: bool) -> None:
    """Say on standard error what did not fit into an answer's prompt, and explain the answer on request."""
    if answer.dropped_tokens:
        click.echo(f"edgecompose: the first {answer.dropped_tokens} tokens did not fit and were left out", err=True)
    if explain:
        for line in serialize.explain_answer(answer):
            click.echo(line, err=True)
