"""The command `edgecompose eval`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from edgecompose.cli.console import counting
from edgecompose.cli.options import (
    bundle_argument,
    device_option,
    form_option,
    json_option,
    kv_cache_option,
    merge_options,
    no_sampling,
    open_composer,
    parse_weights,
    print_json,
    print_lines,
    request_of,
    retrieval_options,
)
from edgecompose.evaluation import table
from edgecompose.evaluation.charts import require_matplotlib
from edgecompose.evaluation.examples import merge_examples, read_eval_examples
from edgecompose.evaluation.page import write_report
from edgecompose.evaluation.runner import KINDS, MAX_TOKENS, Variant, evaluate, parse_variants
from edgecompose.merging.methods import METHODS


def _parse_methods(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(","))
    unknown = [name for name in names if name not in (*KINDS, *METHODS)]
    if unknown or len(set(names)) < len(names):
        raise click.BadParameter(
            f"{value!r} names {repr(unknown[0]) + ', which is unknown' if unknown else 'one twice'}; "
            f"use some of {', '.join((*KINDS, *METHODS))}"
        )
    return names


@click.command("eval")
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
    "--answer-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Store answers in this file, which makes the evaluation resumable.",
)
@click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write a report with charts to this folder (needs edgecompose[report]), with --answer-cache in it.",
)
@retrieval_options
@no_sampling
@merge_options
@device_option
@kv_cache_option
@json_option
def evaluate_examples(
    bundle: Path,
    data: tuple[Path, ...],
    methods: tuple[str, ...],
    by_hand: tuple[str, ...],
    limit: int | None,
    exclude_own: bool,
    answer_cache: Path | None,
    report_folder: Path | None,
    device: str,
    kv_cache: str,
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
        answer_cache = answer_cache or report_folder / "answers.jsonl"
    with open_composer(bundle, device, kv_cache=kv_cache) as composer:
        request = request_of(composer, options, methods=[name for name in methods if name in METHODS])
        variants = parse_variants(methods, request, exclude_own)
        weights = parse_weights(by_hand)
        if weights is not None:
            variants.insert(0, Variant("by hand", "fixed", dataclasses.replace(request, weights=weights)))
        with counting("answering", len(examples) * len(variants)) as advance:
            evaluation = evaluate(composer, examples, variants, answer_cache=answer_cache, advance=advance)
        settings = table.settings_json(composer, variants)
    settings |= {"files": [path.name for path in data], "limit": limit}
    summary = evaluation.summary()
    result = table.evaluation_json(summary, settings)
    pages = [] if report_folder is None else write_report(evaluation, summary, result, report_folder)
    if as_json:
        print_json(result)
    else:
        print_lines([*table.describe_evaluation(result), *(f"written       {path}" for path in pages[:1])])
