"""Drafts: tokens a second with them against without, on answers that copy from their prompts and on new texts.

    python benchmarks/drafts.py models/demo [--rounds 3] [--tokens 160] [--save DIR]
    python benchmarks/drafts.py BUNDLE --adapters       # under a blend of three adapters; else the base alone
    python benchmarks/drafts.py BUNDLE --drafts 4       # at most so many, in place of the default

Each prompt is answered greedily with drafts and with `drafts=0`, in turns in one process; which comes first changes
from round to round. The rate is that of decoding, without reading the prompt. Reported are, for each kind of task, the
median over prompts of the ratio (each the median over rounds), tokens a second, and the shares of drafted tokens that
were accepted and of the answer's tokens that were drafted. `equal` counts the prompts whose texts are the same in all
rounds: they have to be, and a difference ends in exit code 1. A small base rarely copies as it is told: the shares say
how much its answers could have gained. The last line of the output is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.generation.draft_prompts import COPYING, FREE
from benchmarks.measuring.arguments import command_parser
from benchmarks.measuring.machine import machine, today
from benchmarks.measuring.requests import weights_of
from benchmarks.measuring.results import write_dated
from edgecompose import Answer, Composer, MergeSettings, Request, open_bundle

PROMPTS: Mapping[str, tuple[str, ...]] = {**COPYING, **FREE}


def main() -> int:
    """Parse, measure, print; returns the exit code."""
    options = parser().parse_args()
    with open_bundle(options.bundle, device="cpu") as composer:
        names = sorted(composer.bundle.manifest.adapters)
        weights = weights_of(names, 0) if options.adapters else {}
        request = Request(weights=weights, merge=MergeSettings("product"), max_tokens=options.tokens, raw=False)
        composer.run(next(iter(PROMPTS.values()))[0], request)  # warms up
        rows = {
            kind: [
                measure_prompt(composer, prompt, request, drafts=options.drafts, rounds=options.rounds)
                for prompt in PROMPTS[kind][: options.limit]
            ]
            for kind in options.kinds
        }
    summary = {kind: summarise(of_kind) for kind, of_kind in rows.items()}
    summary |= groups(rows)
    result = {
        "bundle": options.bundle.name,
        "adapters": weights,
        "tokens": options.tokens,
        "summary": summary,
        "prompts": rows,
        "machine": machine(),
        "date": today(),
    }
    print_table(summary)
    if options.save:
        write_dated(options.save, options.name, result)
    print(json.dumps(result))
    return 0 if all(row["equal"] for of_kind in rows.values() for row in of_kind) else 1


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = command_parser(__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--kinds", nargs="+", choices=list(PROMPTS), default=list(PROMPTS))
    options.add_argument("--limit", type=int, help="at most so many prompts of a kind")
    options.add_argument("--tokens", type=int, default=160, help="of the longest answer")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument(
        "--drafts", type=int, help="drafted tokens of a pass at most, by default the product's default"
    )
    options.add_argument("--adapters", action="store_true", help="answer under a blend of three adapters")
    options.add_argument("--save", type=Path, help="folder for a dated JSON file")
    options.add_argument("--name", default="drafts", help="name of that file")
    return options


def measure_prompt(
    composer: Composer, prompt: str, request: Request, *, drafts: int | None, rounds: int
) -> dict[str, Any]:
    """One prompt with drafts and without, in turns."""
    answers: dict[bool, list[Answer]] = {True: [], False: []}
    for turn in range(rounds):
        for drafted in (True, False) if turn % 2 == 0 else (False, True):
            answers[drafted].append(composer.run(prompt, replace(request, drafts=drafts if drafted else 0)))
    rates = {drafted: [rate(answer) for answer in of_kind] for drafted, of_kind in answers.items()}
    texts = {answer.text for of_kind in answers.values() for answer in of_kind}
    last = answers[True][-1]
    return {
        "ratio": statistics.median(a / b for a, b in zip(rates[True], rates[False], strict=True)),
        "tokens_per_s": statistics.median(rates[True]),
        "tokens_per_s_without": statistics.median(rates[False]),
        "generated": last.generated_tokens,
        "drafted": last.drafted_tokens,
        "accepted": last.accepted_tokens,
        "equal": len(texts) == 1,
        "text": answers[False][0].text[:400],
    }


def rate(answer: Answer) -> float:
    """Tokens a second of an answer, without reading its prompt."""
    return 1e3 * answer.generated_tokens / answer.timings_ms["decode"]


def groups(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The same over all copying tasks, and over all free texts, as far as they were measured."""
    named = {"all copying": COPYING, "all free": FREE}
    joined = {name: [row for kind in kinds for row in rows.get(kind, ())] for name, kinds in named.items()}
    return {name: summarise(of_group) for name, of_group in joined.items() if of_group}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over prompts, the least ratio, and shares of all their tokens."""
    drafted, accepted, generated = (sum(row[name] for row in rows) for name in ("drafted", "accepted", "generated"))
    return {
        "ratio": statistics.median(row["ratio"] for row in rows),
        "least_ratio": min(row["ratio"] for row in rows),
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows),
        "tokens_per_s_without": statistics.median(row["tokens_per_s_without"] for row in rows),
        "accepted_of_drafted": accepted / drafted if drafted else None,
        "accepted_of_generated": accepted / generated if generated else None,
        "equal": sum(row["equal"] for row in rows),
        "prompts": len(rows),
    }


def print_table(summary: Mapping[str, Mapping[str, Any]]) -> None:
    """The summary for people, ratios first."""
    print("with drafts  (least)  tokens/s  without  accepted of drafted  of the answer  equal texts  task")
    for kind, row in summary.items():
        shares = ["-" if row[f"accepted_of_{of}"] is None else f"{row[f'accepted_of_{of}']:.0%}" for of in _SHARES]
        print(
            f"{row['ratio']:9.2f} x  {row['least_ratio']:7.2f}  {row['tokens_per_s']:8.1f}  "
            f"{row['tokens_per_s_without']:7.1f}  {shares[0]:>19}  {shares[1]:>13}  "
            f"{row['equal']:>4} of {row['prompts']:<4}  {kind}"
        )


_SHARES = ("drafted", "generated")


if __name__ == "__main__":
    sys.exit(main())
