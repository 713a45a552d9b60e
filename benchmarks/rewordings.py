"""The prompts of the task data in other words: the same content, asked for as people might type it.

    python benchmarks/rewordings.py DATA_DIR

Every dataset has one fixed template, which gives it away to a retriever. `fields_of` takes a prompt apart into what the
template was filled with, and `reword` fills one of fourteen other wordings with it: a0 to a11 to train on, h0 and h1
held out, which share no four words in a row with those or with any template, and write options in `HELD_OUT_STYLES`,
which no other wording does. They are in `rewordings.toml`. The command prints one example of each wording of each task
in `<task>.<split>.jsonl`, and the share of prompts taken apart.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

#: Names of the wordings to train on, and of those never to train on.
AUGMENT, HELD_OUT = tuple(f"a{number}" for number in range(12)), ("h0", "h1")
SPLITS = ("train", "valid", "test")
#: What copa asks for, in the dataset's own words.
CAUSE, EFFECT = "What was the cause of this?", "What happened as a result?"

#: Dataset -> its wordings by name.
WORDINGS: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
#: Dataset -> the template of its prompts.
TEMPLATES = {
    "mnli": "Premise: {premise}\nHypothesis: {hypothesis}\n"
    "Given the premise, is the hypothesis true? Say yes, maybe or no.\nAnswer:",
    "snli": "A photo is described as: {premise}\nIs it then true that: {hypothesis}\nSay yes, maybe or no.\nAnswer:",
    "anli": "Paragraph: {premise}\nClaim: {hypothesis}\n"
    "Going by the paragraph alone, is the claim true? Say yes, maybe or no.\nAnswer:",
    "cb": "Text: {premise}\nStatement: {hypothesis}\n"
    "Does the writer of the text commit to the statement? Say yes, maybe or no.\nAnswer:",
    "rte": "Passage: {premise}\nDoes it follow from the passage that the next sentence is true? {hypothesis}\n"
    "Say yes or no.\nAnswer:",
    "wnli": "Sentence 1: {premise}\nSentence 2: {hypothesis}\n"
    "If sentence 1 is true, is sentence 2 true as well? Say yes or no.\nAnswer:",
    "qnli": "Question: {premise}\nSentence: {hypothesis}\n"
    "Does the sentence contain the answer to the question? Say yes or no.\nAnswer:",
    "mrpc": "First: {premise}\nSecond: {hypothesis}\nDo both sentences mean the same? Say yes or no.\nAnswer:",
    "wic": "Sentence A: {premise}\nSentence B: {hypothesis}\n"
    'Is the word "{word}" used with the same meaning in both? Say yes or no.\nAnswer:',
    "imdb": "Movie review: {text}\nIs this review positive or negative?\nAnswer:",
    "yelp": "Customer review of a business: {text}\n"
    "Would you call this customer's experience positive or negative?\nAnswer:",
    "sst2": "Sentence from a film critic: {text}\nIs the sentence positive or negative about the film?\nAnswer:",
    "sentiment140": "Tweet: {text}\nIs the mood of this tweet positive or negative?\nAnswer:",
    "copa": "{question}\n{ask}\nOptions:\n{options}\nAnswer:",
    "hellaswag": "Choose the most plausible continuation of this passage.\n\n"
    "Passage: {question}\nOptions:\n{options}\nContinuation:",
    "piqa": "Goal: {question}\nWhich of these solutions reaches the goal?\nOptions:\n{options}\nSolution:",
    "story_cloze": "Read the beginning of a story and choose its best ending.\n\n"
    "Story: {question}\nOptions:\n{options}\nEnding:",
    "commonsense_qa": "Use common sense to answer.\n\nQuestion: {question}\nOptions:\n{options}\nAnswer:",
    "cosmos_qa": "Context: {context}\n\nQuestion: {question}\nOptions:\n{options}\nAnswer:",
    "arc": "Answer this science exam question with one of the options.\n\n"
    "Question: {question}\nOptions:\n{options}\nAnswer:",
    "openbookqa": "Complete the statement or answer the question about elementary science.\n\n"
    "{question}\nOptions:\n{options}\nAnswer:",
    "boolq": "Passage: {premise}\nQuestion: {hypothesis}?\nAnswer the question with yes or no.\nAnswer:",
    "multirc": "Text: {premise}\n\nQuestion: {question}\nProposed answer: {answer}\n"
    "Is the proposed answer correct? Say yes or no.\nAnswer:",
    "squad": "Passage: {passage}\n\nQuestion: {question}\nAnswer with words from the passage.\nAnswer:",
    "natural_questions": "Answer the question with a short fact.\n\nQuestion: {question}\nAnswer:",
    "trivia_qa": "Trivia quiz: {question}\nGive the answer in a few words.\nAnswer:",
}
#: Task -> dataset, where a dataset's rounds or halves are tasks of their own.
_DATASETS = {
    "anli_r1": "anli",
    "anli_r2": "anli",
    "anli_r3": "anli",
    "mnli_matched": "mnli",
    "mnli_mismatched": "mnli",
    "arc_easy": "arc",
    "arc_challenge": "arc",
}
#: What a field may hold, where that is not any text.
_FIELD_PATTERNS = {"options": r"- .+\n- .+", "ask": f"{re.escape(CAUSE)}|{re.escape(EFFECT)}"}


def _listed(marks: Sequence[str], between: str = "\n") -> Callable[[Sequence[str]], str]:
    """Each option behind a mark; the last mark serves all further options."""

    def write(options: Sequence[str]) -> str:
        used = [marks[min(i, len(marks) - 1)] for i in range(len(options))]
        return between.join(f"{mark}{option}" for mark, option in zip(used, options, strict=True))

    return write


def _joined(options: Sequence[str]) -> str:
    """'x, y or z'."""
    return " or ".join([", ".join(options[:-1]), options[-1]])


def _unstopped(options: Sequence[str]) -> list[str]:
    """Options without the full stop at their end, to stand within a sentence."""
    return [option.removesuffix(".") for option in options]


#: Ways to write options.
STYLES: dict[str, Callable[[Sequence[str]], str]] = {
    "dash": _listed(["- "]),
    "star": _listed(["* "]),
    "bullet": _listed(["\u2022 "]),
    "arrow": _listed(["-> "]),
    "plain": _listed([""]),
    "letters": _listed([f"{letter}) " for letter in string.ascii_lowercase]),
    "capitals": _listed([f"{letter}. " for letter in string.ascii_uppercase]),
    "numbers": _listed([f"{number}. " for number in range(1, 27)]),
    "inline": _listed([f"({number}) " for number in range(1, 27)], " "),
    "slash": lambda options: " / ".join(_unstopped(options)),
    "semicolons": lambda options: "; ".join(_unstopped(options)),
    "or": lambda options: _joined(_unstopped(options)),
    "quoted": lambda options: _joined([f'"{option}"' for option in options]),
}
#: Those that only held-out wordings use.
HELD_OUT_STYLES = frozenset({"plain", "capitals", "numbers", "inline", "slash"})


class _Options(str):
    """Options as the dataset lists them; `format` writes them in one of `STYLES`."""

    def __format__(self, style: str) -> str:
        return STYLES[style](options_of(self)) if style else str(self)


class _Ask(str):
    """What copa asks for; `format` chooses the first of two phrases for a cause, the second for an effect."""

    def __format__(self, phrases: str) -> str:
        if not phrases:
            return str(self)
        cause, effect = phrases.split("|")
        return cause if self == CAUSE else effect


def dataset_of(task: str) -> str:
    """The dataset whose template and wordings a task has; ValueError for an unknown task."""
    dataset = _DATASETS.get(task, task)
    if dataset not in TEMPLATES or task in _DATASETS.values():
        raise ValueError(f"no task is called {task!r}")
    return dataset


def options_of(listed: str) -> list[str]:
    """The options in the text of a list: '- x\\n- y' -> [x, y]. An option may have several lines."""
    return listed.removeprefix("- ").split("\n- ")


def render(template: str, fields: Mapping[str, str]) -> str:
    """Fill a template of `TEMPLATES` or `WORDINGS` with the fields of a prompt."""
    kinds: dict[str, type[str]] = {"options": _Options, "ask": _Ask}
    return template.format(**{name: kinds.get(name, str)(value) for name, value in fields.items()})


def fields_of(task: str, prompt: str) -> dict[str, str]:
    """Take a prompt of a task apart into what its template was filled with, in the template's order.

    `options` is the list as it stands, for `options_of`. Where a field holds a line that looks like the template's, the
    last such line counts as the template's. ValueError if the prompt is not of the task's template.
    """
    match = _PATTERNS[dataset_of(task)].fullmatch(prompt)
    if match is None:
        raise ValueError(f"not a prompt of {task}: {prompt[:80]!r}")
    return match.groupdict()


def reword(task: str, prompt: str, wording: str) -> str:
    """Put a task's prompt in another wording, one of `AUGMENT` or `HELD_OUT`."""
    wordings = WORDINGS[dataset_of(task)]
    if wording not in wordings:
        raise ValueError(f"no wording is called {wording!r}, only {', '.join(wordings)}")
    return render(wordings[wording], fields_of(task, prompt))


def content_of(task: str, prompt: str) -> str:
    """Only the content of a prompt, a line for each field and each option; what copa asks for is not content."""
    fields = fields_of(task, prompt)
    return "\n".join(
        "\n".join(options_of(value)) if name == "options" else value for name, value in fields.items() if name != "ask"
    )


def _pattern(template: str) -> re.Pattern[str]:
    """A pattern that matches what a template renders to, with a group for each field."""
    parts = (
        re.escape(text) + (f"(?P<{name}>{_FIELD_PATTERNS.get(name, '.+')})" if name else "")
        for text, name, _, _ in string.Formatter().parse(template)
    )
    return re.compile("".join(parts), re.DOTALL)


_PATTERNS = {dataset: _pattern(template) for dataset, template in TEMPLATES.items()}


def main() -> int:
    """Parse, print; exit code 1 if a prompt could not be taken apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    tasks = sorted({path.name.split(".")[0] for path in options.data.glob("*.jsonl")})
    rates = {task: show_task(task, list(read_prompts(options.data, task))) for task in tasks}
    for task, (parsed, prompts) in rates.items():
        print(f"{task:20}{parsed:6} of {prompts:6} taken apart")
    parsed, prompts = (sum(column) for column in zip(*rates.values(), strict=True)) if rates else (0, 0)
    print(f"{'all':20}{parsed:6} of {prompts:6} taken apart, {parsed / max(prompts, 1):.2%}")
    return 0 if 0 < parsed == prompts else 1


def read_prompts(data: Path, task: str) -> Iterator[str]:
    """The prompts of all splits of a task."""
    for path in (data / f"{task}.{split}.jsonl" for split in SPLITS):
        if path.is_file():
            with path.open(encoding="utf-8", newline="\n") as lines:
                yield from (json.loads(line)["prompt"] for line in lines if line.strip())


def show_task(task: str, prompts: Sequence[str]) -> tuple[int, int]:
    """Print the first prompt in every wording; how many prompts could be taken apart, and of how many."""
    parsed = []
    for prompt in prompts:
        try:
            fields_of(task, prompt)
        except ValueError as error:
            print(error, file=sys.stderr)
        else:
            parsed.append(prompt)
    if parsed:
        for name in (*AUGMENT, *HELD_OUT):
            print(f"--- {task} {name}\n{reword(task, parsed[0], name)}")
        print(f"--- {task} content\n{content_of(task, parsed[0])}\n")
    return len(parsed), len(prompts)


if __name__ == "__main__":
    sys.exit(main())
