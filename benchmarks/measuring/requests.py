"""Requests whose answers are measured: under a blend of three adapters each, under one for all, or under none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from benchmarks.measuring.prompts import TASK_PROMPTS
from edgecompose import Answer, EdgeComposeError, MergeSettings, Request

#: Whether sequences have blends that differ, one blend, or none.
Kind = Literal["different_blends", "equal_blends", "base_alone"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_WEIGHTS = (0.5, 0.3, 0.2)


def numbered_prompts(count: int) -> list[str]:
    """Prompts that all differ."""
    return [f"{number}. {TASK_PROMPTS[number % len(TASK_PROMPTS)]}" for number in range(count)]


def weights_of(adapters: Sequence[str], number: int) -> dict[str, float]:
    """Three adapters, or as many as there are, and their weights; no two numbers give the same."""
    names = [adapters[(number + step) % len(adapters)] for step in range(min(3, len(adapters)))]
    return {name: weight + number / 1000 for name, weight in zip(names, _WEIGHTS, strict=False)}


def greedy_requests(adapters: Sequence[str], kind: Kind, count: int, *, tokens: int) -> list[Request]:
    """A request for each of several sequences: greedy, raw, at most `tokens` long, without drafts."""
    first = {} if kind == "base_alone" else weights_of(adapters, 0)
    return [
        Request(
            weights=weights_of(adapters, number) if kind == "different_blends" else first,
            merge=MergeSettings("product"),
            max_tokens=tokens,
            raw=True,
            drafts=0,
        )
        for number in range(count)
    ]


def answered(result: Answer | EdgeComposeError) -> Answer:
    """An answer of a batch; an error in its place is raised."""
    if isinstance(result, EdgeComposeError):
        raise result
    return result
