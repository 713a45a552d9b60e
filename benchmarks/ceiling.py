"""What routing could reach at most where a task's own adapter is missing: the best other adapter, known beforehand.

    python benchmarks/ceiling.py models/demo DATA_DIR --outcomes build/ceiling.jsonl --save FILE

DATA_DIR holds `<task>.<split>.jsonl`. Every adapter but the task's own answers the first `--limit` validation examples
of each task, of the pool and unseen; the best of them, or the base where that is better, answers the first `--test`
examples of the test split. That is what a router would reach that knows, for every task, which one adapter helps it
most; what is left to the own adapter's accuracy is what this pool and base cannot give without it. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found as a script, however edgecompose is installed

from edgecompose import Composer, Request, open_bundle
from edgecompose.cli.console import counting
from edgecompose.evaluation.examples import EvalExample, read_eval_examples
from edgecompose.evaluation.runner import Contender, evaluate

BASE = Contender("base", "base")


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--tasks", nargs="*", help="these only")
    parser.add_argument("--outcomes", type=Path)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    found = []
    with open_bundle(options.bundle, device="cpu") as composer:
        for path in sorted(options.data.glob("*.valid.jsonl")):
            task = path.name.split(".")[0]
            if options.tasks and task not in options.tasks:
                continue
            valid = read_eval_examples(path, options.limit)
            test = read_eval_examples(options.data / f"{task}.test.jsonl", options.test)
            found.append(ceiling(composer, task, valid, test, options.outcomes))
            print(describe(found[-1]), flush=True)
    print("\n".join(summary(found, composer.bundle.manifest.adapters)))
    if options.save:
        settings = {"limit": options.limit, "test": options.test}
        options.save.write_text(json.dumps({**settings, "tasks": [asdict(c) for c in found]}) + "\n", encoding="utf-8")


def ceiling(
    composer: Composer, task: str, valid: Sequence[EvalExample], test: Sequence[EvalExample], outcomes: Path | None
) -> Ceiling:
    """The adapter that answers a task best on validation examples, and what it is worth on test examples."""
    others = [fixed(name) for name in composer.bundle.manifest.adapters if name != task]
    worth = accuracies(composer, valid, [BASE, *others], outcomes)
    best = max(worth, key=worth.__getitem__)
    chosen = [contender for contender in others if contender.name == best]
    own = [fixed(task)] if task in composer.bundle.manifest.adapters else []
    after = accuracies(composer, test, [BASE, *chosen, *own], outcomes)
    return Ceiling(task, best, worth[best], after["base"], after[best], after[task] if own else None)


def fixed(adapter: str) -> Contender:
    """An adapter at its full strength, whatever retrieval says."""
    return Contender(adapter, "fixed", Request(weights={adapter: 1.0}))


def accuracies(
    composer: Composer, examples: Sequence[EvalExample], contenders: Sequence[Contender], outcomes: Path | None
) -> dict[str, float]:
    """Share of right answers by contender."""
    with counting(examples[0].task, len(examples) * len(contenders)) as advance:
        judged = evaluate(composer, examples, contenders, outcomes=outcomes, advance=advance).judgements
    return {name: float(np.mean([one.right for one in found])) for name, found in judged.items()}


def describe(found: Ceiling) -> str:
    """One line."""
    own = "" if found.own is None else f", own {100 * found.own:.1f}"
    return (
        f"{found.task:18} {found.chosen:16} validation {100 * found.valid:5.1f}  test {100 * found.test:5.1f} "
        f"(base {100 * found.base:.1f}{own})"
    )


def summary(found: Sequence[Ceiling], pool: Collection[str]) -> list[str]:
    """Means over the tasks of the pool and over the unseen ones."""
    lines = []
    for name, part in (
        ("left out", [c for c in found if c.task in pool]),
        ("unseen", [c for c in found if c.task not in pool]),
    ):
        if part:
            base, best = (100 * float(np.mean([getattr(c, field) for c in part])) for field in ("base", "test"))
            gain = f"best other adapter {best:.1f} ({best - base:+.1f})"
            lines.append(f"{name}: {len(part)} tasks, base {base:.1f}, {gain}")
    return lines


if __name__ == "__main__":
    main()
