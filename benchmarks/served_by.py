"""Which adapters serve each task best, by its validation examples (LoRAuter's idea, arXiv 2601.21795).

    python benchmarks/served_by.py models/demo DATA_DIR --outcomes build/outcomes.jsonl

DATA_DIR holds `<task>.<split>.jsonl`. Every task tries no adapter, its own at half its strength, its own with each of
its kindred (`KINDRED`) at equal weights, and all of those at equal weights, on the first half of its examples; the best
of them then meets the own adapter on the second half, which no choice has seen. It is named, as a line of a recipe,
when it is ahead there too and the paired bootstrap over all of them has it ahead in `--sure` of its resamples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgecompose import Composer, Request, open_bundle
from edgecompose.evaluation.examples import EvalExample, read_eval_examples
from edgecompose.evaluation.results import Evaluation
from edgecompose.evaluation.runner import Contender, evaluate

#: Task -> the tasks whose adapters may help: those of one kind of question and one set of answers.
KINDRED: dict[str, tuple[str, ...]] = {
    "anli_r3": ("mnli_matched", "cb", "snli"), "cb": ("mnli_matched", "anli_r3", "snli"),
    "mnli_matched": ("snli", "anli_r3"), "snli": ("mnli_matched",),
    "rte": ("qnli", "mnli_matched", "wnli"), "wnli": ("rte", "mrpc"), "qnli": ("rte", "mrpc", "boolq"),
    "mrpc": ("wic", "rte", "qnli"), "wic": ("mrpc", "wnli"), "boolq": ("multirc", "qnli"), "multirc": ("boolq", "qnli"),
    "arc_easy": ("openbookqa", "commonsense_qa"), "openbookqa": ("arc_easy", "commonsense_qa"),
    "commonsense_qa": ("arc_easy", "openbookqa"), "cosmos_qa": ("story_cloze", "arc_easy"),
    "piqa": ("arc_easy", "story_cloze"), "copa": ("story_cloze", "commonsense_qa"),
    "story_cloze": ("hellaswag", "copa"), "hellaswag": ("story_cloze", "cosmos_qa"),
    "imdb": ("yelp",), "yelp": ("imdb",), "squad": ("boolq",),
}  # fmt: skip


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
        for task in options.tasks or KINDRED:
            examples = read_eval_examples(options.data / f"{task}.{options.split}.jsonl", options.limit)
            line = best(composer, task, examples, options.outcomes, options.sure)
            print(line, flush=True)


def candidates(task: str) -> list[Contender]:
    """The blends that a task tries, its own adapter last."""
    kindred = KINDRED[task]
    blends: list[dict[str, float]] = [{}, {task: 0.5}, *({task: 0.5, name: 0.5} for name in kindred)]
    if len(kindred) > 1:
        blends.append(dict.fromkeys((task, *kindred), 1 / (1 + len(kindred))))
    return [fixed(weights) for weights in (*blends, {task: 1.0})]


def fixed(weights: Mapping[str, float]) -> Contender:
    """A contender whose name is a recipe's table."""
    name = ", ".join(f"{adapter} = {weight:.4g}" for adapter, weight in weights.items())
    return Contender(name, "fixed", Request(weights=weights))


def best(composer: Composer, task: str, examples: Sequence[EvalExample], outcomes: Path | None, sure: float) -> str:
    """The recipe's line of a task, its own adapter where no other blend is surely better."""
    contenders = candidates(task)
    half = len(examples) // 2
    first = evaluate(composer, examples[:half], contenders, outcomes=outcomes)
    by_name = {contender.name: contender for contender in contenders}
    means = {name: first.standing(name).mean or 0.0 for name in by_name}
    for name in sorted(means, key=lambda name: -means[name]):
        print(f"{task:16} {100 * means[name]:5.1f}  {name or 'base alone'}", file=sys.stderr, flush=True)
    own = contenders[-1].name
    chosen = max(means, key=lambda name: (means[name], name == own))
    if chosen == own:
        return f"{task}: its own adapter"
    pair = [by_name[own], by_name[chosen]]
    unseen, whole = (
        Evaluation(chosen, evaluate(composer, part, pair, outcomes=outcomes).judgements).against(own)
        for part in (examples[half:], examples)
    )
    if unseen is None or whole is None:
        raise ValueError(f"no example of {task}")
    ahead = f"{100 * whole.paired.difference:+.1f} points, {100 * unseen.paired.difference:+.1f} on the second half"
    if unseen.paired.difference > 0 and whole.paired.wins >= sure:
        return f"{task} = {{ served_by = {{ {chosen} }} }}  # {ahead}"
    return f"{task}: its own adapter; {chosen or 'base alone'} {ahead}"


if __name__ == "__main__":
    main()
