"""What composing adapters gives: every way to answer on the same examples, in the pool, left out of it, and unseen.

    python benchmarks/quality.py models/demo DATA_DIR --split valid --limit 50 --plain build/plain \
        --outcomes build/outcomes.jsonl --save benchmarks/results/quality-valid.json

DATA_DIR holds `<task>.<split>.jsonl`. Four settings: `in-pool`, tasks of the bundle as they are; `left-out`, each task
of the bundle with its own examples and adapter left out; `unseen`, tasks that the bundle lacks; `reworded`, tasks of
the bundle in the two wordings of `rewordings.HELD_OUT` by turns, which neither index nor adapters have seen. The
variants are fixed in `VARIANTS`. Those of the paper answer from `--plain`, a bundle of the same adapters whose
index is searched by plain cosine of whole prompts (`python benchmarks/pool.py DATA_DIR --steps plain`); without it they
are left out. `--answer-cache` stores answers: a stopped run is resumable, and no blend is computed twice. Prints a
table for each setting.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found as a script, however edgecompose is installed

from benchmarks.rewordings import HELD_OUT, reword
from edgecompose import Composer, Request, open_bundle
from edgecompose.cli.console import counting
from edgecompose.engine.device import usable_cores
from edgecompose.evaluation.examples import EvalExample, read_eval_examples
from edgecompose.evaluation.results import Evaluation, Result
from edgecompose.evaluation.runner import Kind, Variant, evaluate
from edgecompose.evaluation.table import describe_evaluation, evaluation_json, settings_json
from edgecompose.settings import MergeSettings, RetrievalSettings

Setting = Literal["in-pool", "left-out", "unseen", "reworded"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
#: The paper's rule: 100 neighbours, T = 1, nucleus over tasks with p = 0.9.
PAPER = Request(
    retrieval=RetrievalSettings(
        neighbours=100, routing_temperature=1.0, nucleus=0.9, class_size_exponent=0.0, shortcut=1.0, fallback=0.0
    )
)
MAIN = "ours"


@dataclass(frozen=True, slots=True)
class Entry:
    """A variant, whether it is a main row (answers all examples), and whether it answers from the plain bundle."""

    variant: Variant
    main: bool = False
    plain: bool = False


def _paper(method: str) -> Entry:
    return Entry(Variant(f"paper {method}", "retrieved", replace(PAPER, merge=MergeSettings(method))), plain=True)


def _ours(name: str, *, main: bool = False, **settings: Any) -> Entry:
    return Entry(Variant(name, "retrieved", Request(merge=MergeSettings(**settings))), main)


def _kind(kind: Kind) -> Entry:
    return Entry(Variant(kind, kind), main=True)


VARIANTS: tuple[Entry, ...] = (
    _kind("base"),
    _kind("own"),
    _kind("top1"),
    _kind("uniform"),
    *(_paper(method) for method in ("linear", "cat", "ties", "magnitude_prune")),
    _ours("ours, linear", main=True, method="linear"),
    _ours("ours, svd", method="svd", energy=0.99),
    _ours("ours, core_ties", method="core_ties"),
    _ours("ours, core_prune", method="core_prune"),
    _ours("ours, core_dare", method="core_dare"),
    Entry(Variant(MAIN, "retrieved"), main=True),
)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--limit", type=int, help="examples of a task")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--tasks", nargs="*", help="these only")
    parser.add_argument("--variants", nargs="*", help="these only; 'main' for the main rows")
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--answer-cache", type=Path)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "split": options.split,
        "limit": options.limit,
        "cores": usable_cores(),
        "settings": {},
    }
    with open_bundle(options.bundle, device="cpu") as composer:
        plain = open_bundle(options.plain, device="cpu") if options.plain else None
        for setting in options.settings:
            examples = list(read_split(composer, options, setting))
            entries = chosen(options.variants, setting, with_plain=plain is not None)
            evaluation = measure(composer, plain, examples, entries, options.answer_cache)
            settings = settings_json(composer, [e.variant for e in entries])
            results["settings"][setting] = evaluation_json(evaluation.summary(), settings)
            print(f"\n{setting}", *describe_evaluation(results["settings"][setting]), sep="\n", flush=True)
            if options.save:
                options.save.write_text(json.dumps(results) + "\n", encoding="utf-8")


def read_split(composer: Composer, options: argparse.Namespace, setting: Setting) -> Iterable[EvalExample]:
    """The examples of a setting's tasks."""
    pool = composer.bundle.manifest.tasks
    for path in sorted(options.data.glob(f"*.{options.split}.jsonl")):
        task = path.name.split(".")[0]
        if (task in pool) != (setting == "unseen") and (not options.tasks or task in options.tasks):
            examples = read_eval_examples(path, options.limit)
            yield from reworded(examples) if setting == "reworded" else examples


def reworded(examples: Iterable[EvalExample]) -> Iterable[EvalExample]:
    """The same examples, asked in the held-out wordings by turns."""
    for example, wording in zip(examples, itertools.cycle(HELD_OUT), strict=False):
        yield replace(example, prompt=reword(example.task, example.prompt, wording))


def chosen(names: Sequence[str] | None, setting: Setting, *, with_plain: bool) -> list[Entry]:
    """The variants of a run; the main one is always there."""
    selected = []
    for entry in VARIANTS:
        name = entry.variant.name
        is_named = not names or name in names or ("main" in names and entry.main) or name == MAIN
        if is_named and (with_plain or not entry.plain) and not (setting == "unseen" and name == "own"):
            variant = replace(entry.variant, exclude_own=setting == "left-out")
            selected.append(replace(entry, variant=variant))
    return selected


def measure(
    composer: Composer,
    plain: Composer | None,
    examples: Sequence[EvalExample],
    entries: Sequence[Entry],
    answer_cache: Path | None,
) -> Evaluation:
    """Have the variants answer, each from its bundle."""
    results: dict[str, tuple[Result, ...]] = {}
    for source, uses_plain in ((plain, True), (composer, False)):
        variants = [e.variant for e in entries if e.plain == uses_plain]
        if source is None or not variants:
            continue
        with counting("plain" if uses_plain else "main", len(examples) * len(variants)) as advance:
            results |= evaluate(source, examples, variants, answer_cache=answer_cache, advance=advance).results
    if not results.get(MAIN):
        sys.exit("quality: no example of this setting was found; check DATA_DIR and --split")
    return Evaluation(MAIN, {e.variant.name: results[e.variant.name] for e in entries})


if __name__ == "__main__":
    main()
