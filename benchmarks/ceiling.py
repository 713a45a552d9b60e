"""An upper limit of routing for a task without its own adapter: the best other adapter, known beforehand.

    python benchmarks/ceiling.py models/demo DATA_DIR --answer-cache build/ceiling.jsonl --save FILE

DATA_DIR holds `<task>.<split>.jsonl`. Every adapter but the task's own answers the first `--limit` validation examples
of each task, of the pool and unseen. The best of them, or the base if that is better, answers the first `--test`
examples of the test split. A router that knows the best single adapter of every task reaches this accuracy. The gap to
the own adapter's accuracy is out of reach for this pool and base. Prints a table.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.measuring.arguments import command_parser
from benchmarks.measuring.results import write_result
from edgecompose import Composer, Request, open_bundle
from edgecompose.cli.console import counting
from edgecompose.evaluation.examples import EvalExample, read_eval_examples
from edgecompose.evaluation.runner import Variant, evaluate

BASE = Variant("base", "base")


@dataclass(frozen=True, slots=True)
class Ceiling:
    """One task: the chosen adapter ('base' for none) and accuracies in [0, 1]; `own` is None for unseen tasks."""

    task: str
    chosen: str
    valid: float
    base: float
    test: float
    own: float | None


def main() -> None:
    """Parse, measure, print."""
    parser = command_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--tasks", nargs="*", help="these only")
    parser.add_argument("--answer-cache", type=Path, dest="cache", help="file of earlier answers")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    ceilings = []
    with open_bundle(options.bundle, device="cpu") as composer:
        for path in sorted(options.data.glob("*.valid.jsonl")):
            task = path.name.split(".")[0]
            if options.tasks and task not in options.tasks:
                continue
            valid = read_eval_examples(path, options.limit)
            test = read_eval_examples(options.data / f"{task}.test.jsonl", options.test)
            ceilings.append(ceiling(composer, task, valid=valid, test=test, cache=options.cache))
            print(describe(ceilings[-1]), flush=True)
    print("\n".join(summary(ceilings, composer.bundle.manifest.adapters)))
    if options.save:
        settings = {"limit": options.limit, "test": options.test}
        write_result(options.save, {**settings, "tasks": [asdict(c) for c in ceilings]})


def ceiling(
    composer: Composer,
    task: str,
    *,
    valid: Sequence[EvalExample],
    test: Sequence[EvalExample],
    cache: Path | None,
) -> Ceiling:
    """The adapter that answers a task best on validation examples, and its accuracy on test examples."""
    others = [fixed(name) for name in composer.bundle.manifest.adapters if name != task]
    before = accuracies(composer, valid, [BASE, *others], cache=cache)
    best = max(before, key=before.__getitem__)
    chosen = [variant for variant in others if variant.name == best]
    own = [fixed(task)] if task in composer.bundle.manifest.adapters else []
    after = accuracies(composer, test, [BASE, *chosen, *own], cache=cache)
    return Ceiling(
        task,
        chosen=best,
        valid=before[best],
        base=after["base"],
        test=after[best],
        own=after[task] if own else None,
    )


def fixed(adapter: str) -> Variant:
    """An adapter at its full strength, without retrieval."""
    return Variant(adapter, "fixed", Request(weights={adapter: 1.0}))


def accuracies(
    composer: Composer, examples: Sequence[EvalExample], variants: Sequence[Variant], *, cache: Path | None
) -> dict[str, float]:
    """Share of right answers by variant."""
    with counting(examples[0].task, len(examples) * len(variants)) as advance:
        results = evaluate(composer, examples, variants, answer_cache=cache, advance=advance).results
    return {name: float(np.mean([answer.right for answer in answers])) for name, answers in results.items()}


def describe(row: Ceiling) -> str:
    """One line."""
    own = "" if row.own is None else f", own {100 * row.own:.1f}"
    return (
        f"{row.task:18} {row.chosen:16} validation {100 * row.valid:5.1f}  test {100 * row.test:5.1f} "
        f"(base {100 * row.base:.1f}{own})"
    )


def summary(rows: Sequence[Ceiling], pool: Collection[str]) -> list[str]:
    """Means over the tasks of the pool and over the unseen ones."""
    lines = []
    for name, part in (
        ("left out", [c for c in rows if c.task in pool]),
        ("unseen", [c for c in rows if c.task not in pool]),
    ):
        if part:
            base, best = (100 * float(np.mean([getattr(c, field) for c in part])) for field in ("base", "test"))
            gain = f"best other adapter {best:.1f} ({best - base:+.1f})"
            lines.append(f"{name}: {len(part)} tasks, base {base:.1f}, {gain}")
    return lines


if __name__ == "__main__":
    main()
