"""Answers of an evaluation in a JSONL file, which makes the evaluation resumable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgecompose.bundle.jsonl import ResumableFile, open_resumable
from edgecompose.bundle.records import value_from_json
from edgecompose.errors import EvaluationError

#: How every line begins, by which an incomplete line is known.
_START = b'{"key": {"base": '


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """All that an answer depends on: base, example, blend (its content hash), and the request.

    `base` names the model, `max_tokens` is None where choices were scored.
    """

    base: str
    example: str
    composition: str
    raw: bool
    scoring: Literal["choices", "text"]
    max_tokens: int | None


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer, whether it is right, and the milliseconds of each stage of its computation."""

    answer: str
    right: bool
    timings_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Line:
    key: AnswerKey
    task: str
    cached: CachedAnswer


@dataclass(slots=True)
class AnswerCache:
    """Answers by key, appended to a file where there is one, each as soon as it is computed."""

    answers: dict[AnswerKey, CachedAnswer] = field(default_factory=dict)
    file: ResumableFile[_Line] | None = None

    def add(self, key: AnswerKey, task: str, cached: CachedAnswer) -> None:
        """Store an answer; `task` is for readers of the file."""
        self.answers[key] = cached
        if self.file is not None:
            self.file.append(json.dumps(dataclasses.asdict(_Line(key, task, cached))))


@contextmanager
def open_answer_cache(path: Path | None) -> Iterator[AnswerCache]:
    """The answer cache of a file, which is made where it is absent; None keeps answers in memory only.

    Raises:
        EvaluationError: the file holds something else.
        OSError: it cannot be read or written.
    """
    if path is None:
        yield AnswerCache()
        return
    with open_resumable(
        path,
        lambda value: value_from_json(_Line, value, "cached"),
        start=_START,
        error=EvaluationError,
        content="answer of an evaluation",
    ) as file:
        yield AnswerCache({line.key: line.cached for line in file.earlier}, file)
