"""Three ways to choose adapters for a conversation: by its last message, its first, or all of them together.

    python benchmarks/turns.py models/demo DATA_DIR [--split valid] [--limit 20]

Real examples make two turns of the user. The first is a whole prompt of a task. The second is a prompt of the same
task, a prompt of another task, or the bare input of one of the same task (its longest line, without the question).
Prints, in per cent, how often retrieval ranks the second turn's task first, and the mean weight of its adapters.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.measuring.arguments import command_parser
from edgecompose import Composer, Message, Request, open_bundle
from edgecompose.evaluation.examples import read_eval_examples

KINDS = ("same task", "another task", "bare input")
CHOICES = ("last", "first", "all")


def main() -> None:
    """Parse, measure, print."""
    parser = command_parser(__doc__)
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
        results = measure(composer, prompts)
    for kind, rows in results.items():
        for choice, (right, weight) in rows.items():
            print(f"{kind:14} by the {choice:6} message: right {100 * right:5.1f} %, weight {100 * weight:5.1f} %")
    print(json.dumps(results))


def measure(composer: Composer, prompts: dict[str, list[str]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Kind of second turn -> choice -> (share right, mean weight of the own adapters)."""
    draw, tasks = random.Random(0), sorted(prompts)
    routes: dict[tuple[str, str], list[tuple[bool, float]]] = {}
    for task, own in prompts.items():
        for number, prompt in enumerate(own):
            first = own[(number + 1) % len(own)]
            other = draw.choice([name for name in tasks if name != task])
            elsewhere = draw.choice(prompts[other])
            turns = {
                "same task": (task, prompt),
                "another task": (other, elsewhere),
                "bare input": (task, max(prompt.splitlines(), key=len)),
            }
            for kind, (expected, second) in turns.items():
                for choice in CHOICES:
                    route = _route(composer, (first, second), choice=choice, expected=expected)
                    routes.setdefault((kind, choice), []).append(route)
    return {kind: {choice: _means(routes[kind, choice]) for choice in CHOICES} for kind in KINDS}


def _means(routes: list[tuple[bool, float]]) -> tuple[float, float]:
    return sum(right for right, _ in routes) / len(routes), sum(weight for _, weight in routes) / len(routes)


def _route(composer: Composer, turns: tuple[str, str], *, choice: str, expected: str) -> tuple[bool, float]:
    """Whether retrieval ranks the expected task first, and the weight that it gets."""
    first, second = turns
    if choice == "all":
        retrieval = composer.retrieve(f"{first}\n{second}")
    else:
        messages = [Message("user", first), Message("assistant", "."), Message("user", second)]
        retrieval = composer.retrieve(messages, Request(route_by="first" if choice == "first" else "last"))
    top = max(retrieval.distribution, key=retrieval.distribution.__getitem__, default=None)
    return top == expected, retrieval.nucleus.get(expected, 0.0)


if __name__ == "__main__":
    main()
