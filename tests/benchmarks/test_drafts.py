"""The benchmark of drafts: what it asks, and what it makes of the answers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, cast

import pytest

from benchmarks import drafts
from benchmarks.generation.draft_prompts import COPYING, FREE
from edgecompose import Answer, Composer, Request
from edgecompose.engine.device import choose_device
from edgecompose.retrieval.retriever import Retrieval
from edgecompose.settings import MergeSettings

ANSWER = Answer(
    prompt="p",
    text="t",
    retrieval=Retrieval((), {}, {}, {}),
    settings=MergeSettings(),
    composition="c",
    device=choose_device("cpu"),
    timings_ms={"decode": 100.0},
    prompt_tokens=3,
    generated_tokens=10,
    drafted_tokens=8,
    accepted_tokens=6,
)
COUNTS = {"generated": 10, "drafted": 8, "accepted": 6}


class Answers:
    """Stands in for a composer: twice as fast with drafts, with the text that each of them writes."""

    def __init__(self, texts: dict[int | None, str]) -> None:
        self.texts, self.calls = texts, list[int | None]()

    def run(self, prompt: str, request: Request) -> Answer:
        self.calls.append(request.drafts)
        milliseconds = 100.0 if request.drafts == 0 else 50.0
        return replace(ANSWER, text=self.texts[request.drafts], timings_ms={"decode": milliseconds})


def measure(composer: Answers, limit: int | None = None, rounds: int = 3) -> dict[str, Any]:
    return drafts.measure_prompt(cast(Composer, composer), "p", Request(), drafts=limit, rounds=rounds)


def test_both_take_turns_and_each_comes_first() -> None:
    composer = Answers({None: "t", 0: "t"})
    row = measure(composer)
    assert composer.calls == [None, 0, 0, None, None, 0]
    assert (row["ratio"], row["tokens_per_s"], row["tokens_per_s_without"]) == (2, 200, 100)
    assert row["equal"]
    assert {name: row[name] for name in COUNTS} == COUNTS


def test_another_text_is_recorded() -> None:
    assert not measure(Answers({4: "t", 0: "other"}), limit=4)["equal"]


def test_the_summary_counts_tokens_of_all_prompts() -> None:
    slow = measure(Answers({None: "t", 0: "t"})) | {"ratio": 0.9, "drafted": 0, "accepted": 0, "equal": False}
    rows = [measure(Answers({None: "t", 0: "t"})), slow]
    summary = drafts.summarise(rows)
    assert (summary["ratio"], summary["least_ratio"]) == (pytest.approx(1.45), 0.9)
    assert (summary["accepted_of_drafted"], summary["accepted_of_generated"]) == (0.75, 0.3)
    assert (summary["equal"], summary["prompts"]) == (1, 2)
    assert drafts.summarise([slow])["accepted_of_drafted"] is None
    groups = drafts.groups({"code": rows, "story": [slow]})
    assert {name: row["prompts"] for name, row in groups.items()} == {"all copying": 2, "all free": 1}


def test_there_are_three_prompts_of_each_kind_and_edits_name_words_of_their_texts() -> None:
    assert all(len(set(prompts)) >= 3 for prompts in [*COPYING.values(), *FREE.values()])
    for prompt in [*COPYING["edit"], *COPYING["code"][1:]]:
        text, _, task = prompt.rpartition("\n\n")
        (word, new) = re.findall(r"'(\w+)'", task)
        assert word in text
        assert new not in text
