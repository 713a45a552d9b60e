"""Prompts of the task data in other words: taken apart without loss, and put together differently."""

from __future__ import annotations

import itertools
import json
import re
import string
import sys
from pathlib import Path

import pytest

from benchmarks import rewordings
from benchmarks.rewordings import (
    AUGMENT,
    CAUSE,
    EFFECT,
    HELD_OUT,
    HELD_OUT_STYLES,
    STYLES,
    TEMPLATES,
    WORDINGS,
    content_of,
    dataset_of,
    fields_of,
    options_of,
    read_prompts,
    render,
    reword,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the task data (../shared/data) is not here")
TASKS = [
    "anli_r1",
    "anli_r2",
    "anli_r3",
    "arc_challenge",
    "arc_easy",
    "boolq",
    "cb",
    "commonsense_qa",
    "copa",
    "cosmos_qa",
    "hellaswag",
    "imdb",
    "mnli_matched",
    "mnli_mismatched",
    "mrpc",
    "multirc",
    "natural_questions",
    "openbookqa",
    "piqa",
    "qnli",
    "rte",
    "sentiment140",
    "snli",
    "squad",
    "sst2",
    "story_cloze",
    "trivia_qa",
    "wic",
    "wnli",
    "yelp",
]
NAMES = (*AUGMENT, *HELD_OUT)
#: Words that an answer may be, which every wording of a task has to offer.
LABELS = {
    **dict.fromkeys(["anli", "mnli", "snli", "cb"], {"yes", "maybe", "no"}),
    **dict.fromkeys(["rte", "wnli", "qnli", "mrpc", "wic", "boolq", "multirc"], {"yes", "no"}),
    **dict.fromkeys(["imdb", "yelp", "sst2", "sentiment140"], {"positive", "negative"}),
}
#: No word between two fields.
FIELD = "§"


def fields_in(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def filled(task: str, text: str = "Zebras graze {calmly}.", ask: str = CAUSE) -> dict[str, str]:
    """A different text for each field of a task."""
    names = fields_in(TEMPLATES[dataset_of(task)])
    fields = {name: f"{name} {text}" for name in names}
    special = {"options": f"- one {text}\n- two {text}\n- three {text}", "ask": ask}
    return {name: special.get(name, value) for name, value in fields.items()}


def prompt_of(task: str, fields: dict[str, str]) -> str:
    return render(TEMPLATES[dataset_of(task)], fields)


def sequences(template: str, length: int) -> set[tuple[str, ...]]:
    """Sequences of words of a template's own text, not across fields."""
    result = set()
    fields = dict.fromkeys(fields_in(template), FIELD)
    for ask in (CAUSE, EFFECT):
        special = {"options": f"- {FIELD}\n- {FIELD}", "ask": ask}
        text = render(template, {name: special.get(name, value) for name, value in fields.items()})
        for part in text.lower().split(FIELD):
            words = re.findall(r"[a-z0-9']+", part)
            result |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return result


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "text",
    ["A man sleeps.", "Two lines,\nand\n\nmore - so: {braces} \\d+?", "“Ünïcode”\u2028 100 % \"quoted\" 'text'"],
    ids=["plain", "lines", "characters"],
)
@pytest.mark.parametrize("ask", [CAUSE, EFFECT], ids=["cause", "effect"])
def test_fields_come_back(task: str, text: str, ask: str) -> None:
    fields = filled(task, text, ask)
    assert fields_of(task, prompt_of(task, fields)) == fields


@pytest.mark.parametrize("task", TASKS)
def test_the_last_line_that_looks_like_the_templates_counts(task: str) -> None:
    fields = filled(task)
    first = next(iter(fields))
    fields[first] += "\nQuestion: Why?\nHypothesis: None.\nOptions:\n- three\n- four\nAnswer:"
    assert fields_of(task, prompt_of(task, fields)) == fields


@pytest.mark.parametrize("task", TASKS)
def test_another_prompt_is_refused(task: str) -> None:
    prompt = prompt_of(task, filled(task))
    others = [prompt_of(other, filled(other)) for other in TASKS if dataset_of(other) != dataset_of(task)]
    for wrong in ("", prompt + " yes", prompt[:-1], prompt[1:], "Tell me a story.", *others):
        if task in ("copa", "openbookqa") and wrong == prompt[1:]:
            continue  # begins with a field
        with pytest.raises(ValueError, match="not a prompt of|no task is called"):
            fields_of(task, wrong)


def test_what_is_unknown_is_refused() -> None:
    prompt = prompt_of("snli", filled("snli"))
    for task in ("mnli", "anli", "arc", "nothing"):
        with pytest.raises(ValueError, match="no task is called"):
            fields_of(task, prompt)
    with pytest.raises(ValueError, match="no wording is called 'a99', only a0, a1"):
        reword("snli", prompt, "a99")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_wording_has_every_field(task: str, name: str) -> None:
    fields = filled(task, "Zebras graze {calmly}")
    worded = reword(task, prompt_of(task, fields), name)
    for field, value in fields.items():
        if field != "ask":
            assert all(worded.count(part) == 1 for part in (options_of(value) if field == "options" else [value]))
    assert worded == worded.strip()
    assert LABELS.get(dataset_of(task), set()) <= set(re.findall(r"\w+", worded.lower()))


@pytest.mark.parametrize("name", NAMES)
def test_a_wording_of_copa_says_which_it_asks_for(name: str) -> None:
    cause, effect = (reword("copa", prompt_of("copa", filled("copa", ask=ask)), name) for ask in (CAUSE, EFFECT))
    assert cause != effect


def test_every_dataset_has_all_wordings() -> None:
    assert WORDINGS.keys() == TEMPLATES.keys() == {dataset_of(task) for task in TASKS}
    for dataset, wordings in WORDINGS.items():
        assert sorted(wordings) == sorted(NAMES)
        for wording in wordings.values():
            assert sorted(fields_in(wording)) == sorted(fields_in(TEMPLATES[dataset])), wording


@pytest.mark.parametrize("dataset", TEMPLATES)
def test_wordings_of_a_dataset_differ(dataset: str) -> None:
    texts = {"template": TEMPLATES[dataset], **WORDINGS[dataset]}
    for one, other in itertools.combinations(texts, 2):
        assert not sequences(texts[one], 5) & sequences(texts[other], 5), (one, other)


def test_held_out_wordings_share_no_phrase_with_any_dataset_s_others() -> None:
    known = list(TEMPLATES.values()) + [wordings[name] for wordings in WORDINGS.values() for name in AUGMENT]
    seen = set().union(*(sequences(template, 4) for template in known))
    for dataset, wordings in WORDINGS.items():
        for name in HELD_OUT:
            assert not sequences(wordings[name], 4) & seen, (dataset, name)


def test_held_out_wordings_write_options_as_no_others_do() -> None:
    def styles(names: tuple[str, ...]) -> set[str]:
        texts = [wordings[name] for wordings in WORDINGS.values() for name in names]
        parsed = (part for text in texts for part in string.Formatter().parse(text))
        return {style or "" for _, field, style, _ in parsed if field == "options"}

    assert styles(HELD_OUT) == HELD_OUT_STYLES
    assert styles(AUGMENT) == STYLES.keys() - HELD_OUT_STYLES


def test_no_phrase_gives_wordings_of_many_datasets_away() -> None:
    for name in NAMES:
        phrases = [sequences(wordings[name], 4) for wordings in WORDINGS.values()]
        for phrase in set().union(*phrases):
            assert sum(phrase in result for result in phrases) <= 3, (name, phrase)


def test_content_is_free_of_instructions() -> None:
    assert content_of("imdb", prompt_of("imdb", {"text": "Fine."})) == "Fine."
    fields = {"question": "It rained.", "ask": EFFECT, "options": "- The road\ngot wet.\n- I left."}
    assert content_of("copa", prompt_of("copa", fields)) == "It rained.\nThe road\ngot wet.\nI left."


def test_options_within_a_sentence_lose_their_full_stop() -> None:
    fields = {"question": "What is hot?", "options": "- ice.\n- steam.\n- fog."}
    assert "It's one of these: ice, steam or fog." in reword("arc_easy", prompt_of("arc_easy", fields), "a0")


def test_the_command_counts_and_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rewordings.py", str(tmp_path)])
    assert rewordings.main() == 1
    path = tmp_path / "sst2.train.jsonl"
    path.write_text(json.dumps({"prompt": prompt_of("sst2", filled("sst2"))}) + "\n", encoding="utf-8")
    assert rewordings.main() == 0
    shown = capsys.readouterr().out
    assert all(f"--- sst2 {name}\n" in shown for name in NAMES)
    assert "1 of      1 taken apart, 100.00%" in shown
    with path.open("a", encoding="utf-8") as lines:
        lines.write('{"prompt": "Fun?"}\n')
    assert rewordings.main() == 1
    output = capsys.readouterr()
    assert "1 of      2 taken apart, 50.00%" in output.out
    assert "not a prompt of sst2: 'Fun?'" in output.err


@needs_data
@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_of_the_data_comes_apart(task: str) -> None:
    prompts = list(read_prompts(DATA, task))
    assert prompts
    for prompt in prompts:
        assert prompt_of(task, fields_of(task, prompt)) == prompt


@needs_data
def test_the_data_has_these_tasks_only() -> None:
    assert sorted({path.name.split(".")[0] for path in DATA.glob("*.jsonl")}) == TASKS


@needs_data
def test_templates_are_those_that_the_data_describes() -> None:
    sections = (DATA / "README.md").read_text(encoding="utf-8").split("\n## ")
    result = {}
    for section in sections:
        if template := re.search(r"- template:\n\n```\n(.+?)\n```", section, re.DOTALL):
            result[section.split("\n")[0]] = template[1]
    assert sorted(result) == TASKS
    for task, text in result.items():
        assert text == TEMPLATES[dataset_of(task)]
