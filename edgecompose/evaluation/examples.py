"""Examples with known answers, and whether an answer is right."""

from __future__ import annotations

import hashlib
import itertools
import json
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompose.bundle.jsonl import read_lines
from edgecompose.errors import EvaluationError

_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True, slots=True)
class EvalExample:
    """A prompt with its answer: one of `choices`, or free text that may also read as one of `aliases`."""

    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Content hash (sha256, hexadecimal)."""
        content = [self.task, self.prompt, self.answer, self.choices, self.aliases]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def is_right(self, text: str) -> bool:
        """Whether an answer is right: the choice itself; of free text, the first line, but for form."""
        if self.choices is not None:
            return text == self.answer
        return plain_answer(first_line(text)) in {plain_answer(alias) for alias in (self.answer, *self.aliases)}


def first_line(text: str) -> str:
    """The first line that is not blank, without white space around it."""
    return next(iter(text.strip().splitlines()), "").strip()


def plain_answer(text: str) -> str:
    """An answer without what does not count: case, punctuation, articles, white space.

    What is nothing else keeps it: 'The' is 'the', not ''.
    """
    lower = " ".join(text.lower().split())
    bare = "".join(c for c in lower if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    words = bare.split()
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words) or lower


def read_eval_examples(path: Path, limit: int | None = None) -> list[EvalExample]:
    """The examples of a JSONL file, each once, in order.

    A line is an object with `prompt`, `answer`, and perhaps `choices`, `aliases` and `task`, which by default is the
    file's name up to its first dot. Other fields are ignored, and so are blank lines.

    Args:
        limit: examples of each task to keep, from the first on; None keeps all. Every line is checked.

    Raises:
        EvaluationError: a line that is not such an object; the message names it.
        OSError: the file cannot be read.
    """
    return merge_examples([_lines(path)], limit)


def merge_examples(sources: Iterable[Iterable[EvalExample]], limit: int | None = None) -> list[EvalExample]:
    """Examples of several sources, task by task in order of appearance, each once, at most `limit` of each task."""
    tasks: dict[str, dict[str, EvalExample]] = {}
    for example in itertools.chain.from_iterable(sources):
        examples = tasks.setdefault(example.task, {})
        if limit is None or len(examples) < limit:
            examples.setdefault(example.id, example)
    return [example for examples in tasks.values() for example in examples.values()]


def _lines(path: Path) -> Iterator[EvalExample]:
    task = path.name.split(".")[0]
    for place, fields in read_lines(path, EvaluationError):
        yield _example(fields, task, place)


def _example(fields: Any, task: str, place: str) -> EvalExample:
    if not isinstance(fields, dict):
        raise EvaluationError(f"{place} is {fields!r:.80}; expected an object with prompt and answer")
    for name in ("prompt", "answer"):
        if name not in fields:
            raise EvaluationError(f"{place} has no {name}; every line needs a prompt and an answer")
    if fields.get("task") is not None:
        task = fields["task"]
    task, prompt, answer = (
        _text(value, f"{place}: {name}")
        for name, value in (("task", task), ("prompt", fields["prompt"]), ("answer", fields["answer"]))
    )
    if not task.isprintable():
        raise EvaluationError(f"{place}: task {task!r:.80} has characters that cannot be shown; give it a plain name")
    choices = _texts(fields, "choices", place)
    if choices and (len(choices) < 2 or len(set(choices)) < len(choices)):
        raise EvaluationError(f"{place}: choices are {list(choices)!r:.80}; expected two or more, each once")
    if choices and answer not in choices:
        raise EvaluationError(f"{place}: answer {answer!r:.80} is none of the choices {list(choices)!r:.200}")
    return EvalExample(task, prompt, answer, choices or None, _texts(fields, "aliases", place))


def _texts(fields: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    """A list of texts that may be absent, null or empty."""
    texts = fields.get(name)
    if texts is None:
        return ()
    if not isinstance(texts, list):
        raise EvaluationError(f"{place}: {name} is {texts!r:.80}; expected a list of texts")
    return tuple(_text(text, f"{place}: one of {name}") for text in texts)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f"{place} is {value!r:.80}; expected a text that is not blank")
    return value
