"""What each adapter of a bundle is worth: accuracy of the base, of the task's own adapter, and of the retrieved blend.

    python benchmarks/quality.py models/demo DATA_DIR --split valid --limit 100 [--save FILE]

DATA_DIR holds `<task>.<split>.jsonl` with `prompt`, `answer`, and `choices` (scored by log-likelihood a token) or
`aliases` (exact match of the generated answer, without case, punctuation and articles). Prints a table, and one
JSON line last.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgecompose import Composer, Request, open_bundle


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--tasks", nargs="*", help="default: every task of the bundle")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with open_bundle(options.bundle, device="cpu") as composer:
        for task in options.tasks or sorted(composer.bundle.manifest.tasks):
            path = options.data / f"{task}.{options.split}.jsonl"
            if not path.is_file():
                print(f"{task}: no {path.name}, left out", file=sys.stderr)
                continue
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][: options.limit]
            results[task] = measure_task(composer, task, rows)
            print(f"{task:16}", *(f"{k} {v:.3f}" for k, v in results[task].items() if k != "n"), flush=True)
    line = json.dumps({"split": options.split, "limit": options.limit, "tasks": results})
    if options.save:
        options.save.write_text(line + "\n", encoding="utf-8")
    print(line)


def measure_task(composer: Composer, task: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of base, own adapter and blend with the chat template and without; share routed to the task."""
    own = composer.bundle.manifest.tasks[task].adapter
    contenders = {
        "base": Request(weights={}), "own": Request(weights={own: 1.0}), "retrieved": Request(),
        "base_raw": Request(weights={}, raw=True), "own_raw": Request(weights={own: 1.0}, raw=True),
    }  # fmt: skip
    scores: dict[str, float] = {"n": len(rows)}
    for name, request in contenders.items():
        scores[name] = sum(is_right(composer, row, request) for row in rows) / len(rows)
    top = [next(iter(composer.retrieve(row["prompt"]).distribution)) for row in rows]
    scores["routed"] = sum(t == task for t in top) / len(rows)
    return scores


def is_right(composer: Composer, row: dict[str, Any], request: Request) -> bool:
    """Whether one example is answered as its data says."""
    if row.get("choices"):
        answer = composer.run(row["prompt"], replace(request, choices=tuple(row["choices"])))
        return bool(answer.text == row["answer"])
    answer = composer.run(row["prompt"], replace(request, max_tokens=16))
    return plain(answer.text.split("\n")[0]) in {plain(alias) for alias in row.get("aliases") or [row["answer"]]}


def plain(text: str) -> str:
    """Lower case, without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


if __name__ == "__main__":
    main()
