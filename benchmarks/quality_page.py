"""Writes docs/quality.md out of what `benchmarks/quality.py --save` measured.

    python benchmarks/quality_page.py benchmarks/results/2026-11-25-quality-test-*.json -o docs/quality.md

Only the words in `INTRODUCTION` and `SETTING_WORDS` are written by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INTRODUCTION = """\
# What composing adapters gives

Written by `python benchmarks/quality_page.py`; do not edit. Accuracy is in per cent. Choices are scored by
log-likelihood a token; free-form answers by exact match with an accepted answer, without case, punctuation and
articles. Intervals are 95 % bootstrap intervals of the mean over tasks, with examples resampled within each task;
differences are paired.

`base` is the model alone, `own` the adapter that was trained for the example's task, `top1` the adapter of the top
task, `uniform` equal weights over the tasks of the nucleus. `paper ...` is the rule of arXiv 2602.21222 (100
neighbours by plain cosine, T = 1, p = 0.9) with PEFT's merge of that name. `ours` has the bundle's defaults; `ours,
NAME` has its weights with another merge. The protocol was fixed before the test split was used: [log.md](log.md) has
it, and the conclusions.
"""
#: Tasks that ask the same thing of the same kind of text, and differ in where their examples came from.
TWINS = (("anli_r3", "cb", "mnli_matched", "rte", "snli", "wnli"), ("arc_easy", "openbookqa"))
SETTING_WORDS = {
    "in-pool": "In the pool: the bundle holds the adapter and the training prompts of the example's task",
    "left-out": "Left out: the example's own task is excluded from retrieval",
    "unseen": "Unseen: tasks without an adapter or any indexed prompt",
    "reworded": "Reworded: tasks of the pool, in two wordings that neither index nor adapters have seen",
}


def main() -> None:
    """Parse, read, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.write_text(page(options.results), encoding="utf-8")


def page(paths: Sequence[Path]) -> str:
    """The page for some result files."""
    parts = [INTRODUCTION]
    for path in sorted(paths):
        results = json.loads(path.read_text(encoding="utf-8"))
        limit = "all examples" if results["limit"] is None else f"at most {results['limit']} examples a task"
        cores = results.get("cores")
        timed = "" if cores is None else f", times on {cores} core{'s' if cores > 1 else ''}"
        parts.append(f"## {results['split'].capitalize()} split, {limit}\n\n`benchmarks/results/{path.name}`{timed}\n")
        parts += [f"### {SETTING_WORDS[name]}\n\n{setting(result)}" for name, result in results["settings"].items()]
    return "\n".join(parts)


def setting(result: Mapping[str, Any]) -> str:
    """Variants by their means, then each task."""
    main = result["main"]
    lines = [
        "| variant | tasks | mean | 95 % interval | less than `ours` by | ms an answer |",
        "|---|---|---|---|---|---|",
    ]
    for name, metrics in result["variants"].items():
        low, high = metrics["mean_ci95"]
        against = result["against"].get(name)
        less = ""
        if against is not None:
            less = f"{points(against['difference'])} ({points(against['ci95'][0])} to {points(against['ci95'][1])})"
        label = f"**{name}**" if name == main else name
        entries = (
            label,
            len(metrics["tasks"]),
            percent(metrics["mean_accuracy"]),
            f"{percent(low)} to {percent(high)}",
            less,
            f"{metrics['timings_ms']['total']:.0f}",
        )
        lines.append(f"| {' | '.join(map(str, entries))} |")
    lines += ["", *routing(result["variants"][main]["routing"]["confusion"])]
    names = list(result["variants"])
    lines += ["", f"| task | n | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for task, score in result["variants"][main]["tasks"].items():
        cells = [result["variants"][name]["tasks"].get(task) for name in names]
        row = " | ".join("" if cell is None else percent(cell["accuracy"]) for cell in cells)
        lines.append(f"| {task} | {score['n']} | {row} |")
    return "\n".join(lines) + "\n"


def routing(confusion: Mapping[str, Mapping[str, int]]) -> list[str]:
    """One line: how often the likeliest task is the example's own or its twin; none where that cannot be."""
    strict = {task: _share(counts, (task,)) for task, counts in confusion.items()}
    if not any(strict.values()):
        return []
    twins = {task: _share(counts, next((g for g in TWINS if task in g), (task,))) for task, counts in confusion.items()}
    low = ", ".join(
        f"{task} {percent(hit)}" for task, hit in sorted(strict.items(), key=lambda item: item[1]) if hit < 0.9
    )
    means = (percent(sum(hits.values()) / len(hits)) for hits in (strict, twins))
    return [
        "Likeliest task is the example's own: {} %, its own or a twin: {} %, means over tasks ".format(*means)
        + f"(own below 90: {low or 'none'})."
    ]


def _share(counts: Mapping[str, int], right: Sequence[str]) -> float:
    return sum(counts.get(task, 0) for task in right) / sum(counts.values())


def percent(share: float) -> str:
    """A share in [0, 1] as per cent."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A difference of shares in points, signed."""
    return f"{100 * difference:+.1f}"


if __name__ == "__main__":
    main()
