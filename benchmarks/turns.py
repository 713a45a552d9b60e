"""Which message of a conversation should choose its adapters: the last, the first, or all of them together.

    python benchmarks/turns.py models/demo DATA_DIR [--split valid] [--limit 20]

Two turns of the user's are made of real examples. The first is a whole prompt of a task; the second is one of the same
task, one of another task, or the bare input of one of the same task (its longest line, without the question). Prints
how often the likeliest task is that of the second turn, and the mean weight that its adapters get, in per cent.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from edgecompose import Composer, Message, Request, open_bundle
from edgecompose.evaluation.examples import read_eval_examples

KINDS = ("same task", "another task", "bare input")
CHOICES = ("last", "first", "all")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--limit", type=int, default=20)
    options = parser.parse_args()
    with open_bundle(options.bundle, device="cpu") as composer:
        prompts = {
            task: [e.prompt for e in read_eval_examples(options.data / f"{task}.{options.split}.jsonl", options.limit)]
            for task in composer.bundle.manifest.tasks
        }
        found = measure(composer, prompts)
    for kind, rows in found.items():
        for choice, (right, weight) in rows.items():
            print(f"{kind:14} by the {choice:6} message: right {100 * right:5.1f} %, weight {100 * weight:5.1f} %")
    print(json.dumps(found))


def measure(composer: Composer, prompts: dict[str, list[str]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Kind of second turn -> choice -> (share right, mean weight of the own adapters)."""
    draw, tasks = random.Random(0), sorted(prompts)
    seen: dict[tuple[str, str], list[tuple[bool, float]]] = {}
    for task, own in prompts.items():
        for number, prompt in enumerate(own):
            first = own[(number + 1) % len(own)]
            other = draw.choice([name for name in tasks if name != task])
            elsewhere = draw.choice(prompts[other])
            turns = {
                "same task": (task, prompt), "another task": (other, elsewhere),
                "bare input": (task, max(prompt.splitlines(), key=len)),
            }  # fmt: skip
            for kind, (wanted, second) in turns.items():
                for choice in CHOICES:
                    seen.setdefault((kind, choice), []).append(_routed(composer, first, second, choice, wanted))
    return {
        kind: {
            choice: (
                sum(right for right, _ in seen[kind, choice]) / len(seen[kind, choice]),
                sum(weight for _, weight in seen[kind, choice]) / len(seen[kind, choice]),
            )
            for choice in CHOICES
        }
        for kind in KINDS
    }


def _routed(composer: Composer, first: str, second: str, choice: str, wanted: str) -> tuple[bool, float]:
    if choice == "all":
        found = composer.retrieve(f"{first}\n{second}")
    else:
        talk = [Message("user", first), Message("assistant", "."), Message("user", second)]
        found = composer.retrieve(talk, Request(query="first" if choice == "first" else "last"))
    likeliest = max(found.distribution, key=found.distribution.__getitem__, default=None)
    return likeliest == wanted, found.nucleus.get(wanted, 0.0)


if __name__ == "__main__":
    main()
