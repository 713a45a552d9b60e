"""Which adapters serve each task best, by its validation examples (LoRAuter's idea, arXiv 2601.21795).

    python benchmarks/served_by.py models/demo DATA_DIR --limit 100 --outcomes build/outcomes.jsonl

DATA_DIR holds `<task>.<split>.jsonl`. Within each group of kindred tasks every task tries each adapter of the group
alone, its own with each of the others at equal weights, and all of them at equal weights. What beats the own adapter is
named when the paired bootstrap finds it better in at least `--sure` of its resamples; the lines are those of a recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgecompose import Composer, Request, open_bundle
from edgecompose.evaluation import read_eval_examples
from edgecompose.evaluator import Contender, evaluate
from edgecompose.judgement import Evaluation

#: Kindred tasks; a task tries the adapters of its group.
GROUPS = (
    ("anli_r3", "cb", "mnli_matched", "rte", "snli", "wnli", "qnli", "mrpc"),
    ("arc_easy", "openbookqa", "commonsense_qa", "piqa", "copa"),
    ("cosmos_qa", "hellaswag", "story_cloze", "copa"),
    ("boolq", "multirc", "qnli"),
    ("imdb", "yelp"),
)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--outcomes", type=Path)
    parser.add_argument("--sure", type=float, default=0.95)
    options = parser.parse_args()
    with open_bundle(options.bundle, device="cpu") as composer:
        for task in options.tasks or sorted(composer.bundle.manifest.tasks):
            examples = read_eval_examples(options.data / f"{task}.{options.split}.jsonl", options.limit)
            contenders = list(candidates(composer, task))
            if len(contenders) > 1:
                best(task, evaluate(composer, examples, contenders, outcomes=options.outcomes), options.sure)


def candidates(composer: Composer, task: str) -> Iterator[Contender]:
    """The blends that a task tries, its own adapter last."""
    group = sorted(
        {name for names in GROUPS if task in names for name in names} & set(composer.bundle.manifest.adapters)
    )
    others = [name for name in group if name != task]
    for name in others:
        yield fixed({name: 1.0})
        yield fixed({task: 0.5, name: 0.5})
    if len(others) > 1:
        yield fixed(dict.fromkeys(group, 1 / len(group)))
    yield fixed({task: 1.0})


def fixed(weights: Mapping[str, float]) -> Contender:
    """A contender whose name is a recipe's table."""
    name = ", ".join(f"{adapter} = {weight:.4g}" for adapter, weight in weights.items())
    return Contender(name, "fixed", Request(weights=weights))


def best(task: str, found: Evaluation, sure: float) -> None:
    """Print what was reached, and the recipe's line where another blend is surely better."""
    own = found.main
    standings = sorted(found.judgements, key=lambda name: -(found.standing(name).mean or 0.0))
    for name in standings:
        print(f"{task:16} {100 * (found.standing(name).mean or 0):5.1f}  {name}", file=sys.stderr, flush=True)
    top = standings[0]
    against = Evaluation(top, found.judgements).against(own)
    if top != own and against is not None and against.paired.wins >= sure:
        print(f"{task} = {{ served_by = {{ {top} }} }}  # {100 * against.paired.difference:+.1f} points", flush=True)


if __name__ == "__main__":
    main()
