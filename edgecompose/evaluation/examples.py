"""Examples with known answers, when an answer is right, and how sure an accuracy is; knows nothing of bundles."""

from __future__ import annotations

import hashlib
import json
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.errors import EvaluationError

Bools = npt.NDArray[np.bool_]
Double = npt.NDArray[np.float64]
Interval = tuple[float, float]
#: Resamples of a bootstrap, and the percentiles that bound an interval of 95 %.
RESAMPLES = 2000
_BOUNDS = (2.5, 97.5)
#: Values that a bootstrap draws at a time.
_DRAWN_AT_ONCE = 4 << 20
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
    for example in (example for source in sources for example in source):
        kept = tasks.setdefault(example.task, {})
        if limit is None or len(kept) < limit:
            kept.setdefault(example.id, example)
    return [example for kept in tasks.values() for example in kept.values()]


def bootstrap_interval(right: Bools, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """95 % percentile bootstrap interval of an accuracy.

    It has no width where all are right or all wrong: a bootstrap cannot know what it never saw.

    Args:
        right: (n,), at least one.
    """
    return mean_interval([right], seed, resamples)


def mean_interval(right: Sequence[Bools], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """95 % interval of the mean over tasks of their accuracies, each task resampled within itself.

    Args:
        right: one array (n of the task,) a task, at least one each.
    """
    return _bounds(_resampled_mean([task.astype(np.float64) for task in right], seed, resamples))


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """One's mean over tasks less another's, its 95 % interval, and the share of resamples in which it is above 0."""

    difference: float
    ci95: Interval
    wins: float


def paired_bootstrap(
    one: Sequence[Bools], other: Sequence[Bools], seed: int = 0, resamples: int = RESAMPLES
) -> PairedDifference:
    """Compare two that answered the same examples; an example is drawn with both of its outcomes.

    Args:
        one, other: an array (n of the task,) for each task, in the same order.

    Raises:
        EvaluationError: not the same examples, or none.
    """
    if [len(task) for task in one] != [len(task) for task in other]:
        raise EvaluationError("a paired comparison got different numbers of examples; expected the same examples")
    differences = [a.astype(np.float64) - b.astype(np.float64) for a, b in zip(one, other, strict=True)]
    drawn = _resampled_mean(differences, seed, resamples)
    return PairedDifference(_mean(differences), _bounds(drawn), float((drawn > 0).mean()))


def _mean(tasks: Sequence[Double]) -> float:
    return float(np.mean([task.mean() for task in tasks]))


def _bounds(drawn: Double) -> Interval:
    low, high = np.percentile(drawn, _BOUNDS)
    return float(low), float(high)


def _resampled_mean(tasks: Sequence[Double], seed: int, resamples: int) -> Double:
    """(resamples,) means over tasks, every task drawn anew with replacement."""
    if not tasks or not all(len(task) for task in tasks):
        raise EvaluationError("an interval wants at least one example of each task; none was given")
    rng = np.random.default_rng(seed)
    return np.asarray(np.mean([_task_means(task, rng, resamples) for task in tasks], axis=0), np.float64)


def _task_means(values: Double, rng: np.random.Generator, resamples: int) -> Double:
    rows = max(1, _DRAWN_AT_ONCE // len(values))
    sizes = (min(rows, resamples - start) for start in range(0, resamples, rows))
    drawn = [values[rng.integers(len(values), size=(size, len(values)), dtype=np.int32)].mean(axis=1) for size in sizes]
    return np.concatenate(drawn)


def _lines(path: Path) -> Iterator[EvalExample]:
    task = path.name.split(".")[0]
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                found = json.loads(text) if text else None
            except (ValueError, RecursionError) as error:
                raise EvaluationError(f"{place} is not JSON in UTF-8 ({error}); expected one object a line") from error
            if text:
                yield _example(found, task, place)


def _example(found: Any, task: str, place: str) -> EvalExample:
    if not isinstance(found, dict):
        raise EvaluationError(f"{place} is {found!r:.80}; expected an object with prompt and answer")
    for name in ("prompt", "answer"):
        if name not in found:
            raise EvaluationError(f"{place} has no {name}; every line wants a prompt and an answer")
    if found.get("task") is not None:
        task = found["task"]
    task, prompt, answer = (
        _text(value, f"{place}: {name}")
        for name, value in (("task", task), ("prompt", found["prompt"]), ("answer", found["answer"]))
    )
    if not task.isprintable():
        raise EvaluationError(f"{place}: task {task!r:.80} has characters that cannot be shown; give it a plain name")
    choices = _texts(found, "choices", place)
    if choices and (len(choices) < 2 or len(set(choices)) < len(choices)):
        raise EvaluationError(f"{place}: choices are {list(choices)!r:.80}; expected two or more, each once")
    if choices and answer not in choices:
        raise EvaluationError(f"{place}: answer {answer!r:.80} is none of the choices {list(choices)!r:.200}")
    return EvalExample(task, prompt, answer, choices or None, _texts(found, "aliases", place))


def _texts(found: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    """A list of texts that may be absent, null or empty."""
    texts = found.get(name)
    if texts is None:
        return ()
    if not isinstance(texts, list):
        raise EvaluationError(f"{place}: {name} is {texts!r:.80}; expected a list of texts")
    return tuple(_text(text, f"{place}: one of {name}") for text in texts)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f"{place} is {value!r:.80}; expected a text that is not blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EvaluationError(f"{place} holds half a surrogate pair, which is no Unicode text; write UTF-8") from error
    return value
