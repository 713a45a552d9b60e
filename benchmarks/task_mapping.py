"""The adapters that each task should be mapped to, by its validation examples (LoRAuter's idea, arXiv 2601.21795).

    python benchmarks/task_mapping.py models/demo DATA_DIR --answer-cache build/answers.jsonl

DATA_DIR holds `<task>.<split>.jsonl`. Every task tries no adapter, its own at half its strength, its own with each
adapter of a related task (`RELATED`) at equal weights, and all of those at equal weights, on the first half of its
examples. The best of them is compared with the own adapter on the second half. It is printed as a line of a recipe if
it is better there too, and better in `--sure` of the resamples of a paired bootstrap over all examples.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.measuring.arguments import command_parser
from edgecompose import Composer, Request, open_bundle
from edgecompose.evaluation.examples import EvalExample, read_eval_examples
from edgecompose.evaluation.results import Evaluation
from edgecompose.evaluation.runner import Variant, evaluate

#: Task -> the tasks whose adapters may help: those with the same kind of question and the same set of answers.
RELATED: dict[str, tuple[str, ...]] = {
    "anli_r3": ("mnli_matched", "cb", "snli"),
    "cb": ("mnli_matched", "anli_r3", "snli"),
    "mnli_matched": ("snli", "anli_r3"),
    "snli": ("mnli_matched",),
    "rte": ("qnli", "mnli_matched", "wnli"),
    "wnli": ("rte", "mrpc"),
    "qnli": ("rte", "mrpc", "boolq"),
    "mrpc": ("wic", "rte", "qnli"),
    "wic": ("mrpc", "wnli"),
    "boolq": ("multirc", "qnli"),
    "multirc": ("boolq", "qnli"),
    "arc_easy": ("openbookqa", "commonsense_qa"),
    "openbookqa": ("arc_easy", "commonsense_qa"),
    "commonsense_qa": ("arc_easy", "openbookqa"),
    "cosmos_qa": ("story_cloze", "arc_easy"),
    "piqa": ("arc_easy", "story_cloze"),
    "copa": ("story_cloze", "commonsense_qa"),
    "story_cloze": ("hellaswag", "copa"),
    "hellaswag": ("story_cloze", "cosmos_qa"),
    "imdb": ("yelp",),
    "yelp": ("imdb",),
    "squad": ("boolq",),
}


def main() -> None:
    """Parse, measure, print."""
    parser = command_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--answer-cache", type=Path, dest="cache", help="file of earlier answers")
    parser.add_argument("--sure", type=float, default=0.95)
    options = parser.parse_args()
    with open_bundle(options.bundle, device="cpu") as composer:
        for task in options.tasks or RELATED:
            examples = read_eval_examples(options.data / f"{task}.{options.split}.jsonl", options.limit)
            line = recipe_line(composer, task, examples, cache=options.cache, sure=options.sure)
            print(line, flush=True)


def candidates(task: str) -> list[Variant]:
    """The blends that a task tries, its own adapter last."""
    related = RELATED[task]
    blends: list[dict[str, float]] = [{}, {task: 0.5}, *({task: 0.5, name: 0.5} for name in related)]
    if len(related) > 1:
        blends.append(dict.fromkeys((task, *related), 1 / (1 + len(related))))
    return [fixed(weights) for weights in (*blends, {task: 1.0})]


def fixed(weights: Mapping[str, float]) -> Variant:
    """A variant whose name is a recipe's table."""
    name = ", ".join(f"{adapter} = {weight:.4g}" for adapter, weight in weights.items())
    return Variant(name, "fixed", Request(weights=weights))


def recipe_line(
    composer: Composer, task: str, examples: Sequence[EvalExample], *, cache: Path | None, sure: float
) -> str:
    """The recipe's line of a task: its own adapter, unless another blend is significantly better."""
    variants = candidates(task)
    half = len(examples) // 2
    first = evaluate(composer, examples[:half], variants, answer_cache=cache)
    by_name = {variant.name: variant for variant in variants}
    means = {name: first.metrics(name).mean or 0.0 for name in by_name}
    for name in sorted(means, key=lambda name: -means[name]):
        print(f"{task:16} {100 * means[name]:5.1f}  {name or 'base alone'}", file=sys.stderr, flush=True)
    own = variants[-1].name
    chosen = max(means, key=lambda name: (means[name], name == own))
    if chosen == own:
        return f"{task}: its own adapter"
    pair = [by_name[own], by_name[chosen]]
    unseen, whole = (
        Evaluation(chosen, evaluate(composer, part, pair, answer_cache=cache).results).against(own)
        for part in (examples[half:], examples)
    )
    if unseen is None or whole is None:
        raise ValueError(f"no example of {task}")
    ahead = f"{100 * whole.paired.difference:+.1f} points, {100 * unseen.paired.difference:+.1f} on the second half"
    if unseen.paired.difference > 0 and whole.paired.wins >= sure:
        return f"{task} = {{ adapters = {{ {chosen} }} }}  # {ahead}"
    return f"{task}: its own adapter; {chosen or 'base alone'} {ahead}"


if __name__ == "__main__":
    main()
