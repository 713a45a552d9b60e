"""Answers that were computed before, kept in a JSONL file so that a killed evaluation goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from edgecompose.bundle.records import value_from_json
from edgecompose.errors import EvaluationError, ManifestInvalid

#: How every line begins, by which a line that was cut off is known as ours.
_START = b'{"key": {"base": '


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """All that an answer depends on: base, example, blend (its content hash), and how the answer was asked for.

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
    """AnswerCache by key, appended to `file` where there is one, each as soon as it is known."""

    known: dict[AnswerKey, CachedAnswer] = field(default_factory=dict)
    file: IO[bytes] | None = None

    def add(self, key: AnswerKey, task: str, cached: CachedAnswer) -> None:
        """Keep an answer; `task` is for whoever reads the file."""
        self.known[key] = cached
        if self.file is not None:
            line = dataclasses.asdict(_Line(key, task, cached))
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()


@contextmanager
def open_answer_cache(path: Path | None) -> Iterator[AnswerCache]:
    """The answer cache of a file, which is made where it is absent; None keeps them in memory only.

    A last line that was cut off is taken off the file.

    Raises:
        EvaluationError: the file holds something else.
        OSError: it cannot be read or written.
    """
    if path is None:
        yield AnswerCache()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        known, end = _read(file, path)
        file.truncate(end)
        yield AnswerCache(known, file)


def _read(file: IO[bytes], path: Path) -> tuple[dict[AnswerKey, CachedAnswer], int]:
    """What the file knows, and where its last whole line ends."""
    known: dict[AnswerKey, CachedAnswer] = {}
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n") and (line.startswith(_START) or _START.startswith(line)):
            break
        found = _parse(line, f"{path}:{number}")
        known[found.key] = found.cached
        end += len(line)
    return known, end


def _parse(line: bytes, place: str) -> _Line:
    found: Any = None
    try:
        found = json.loads(line)
        return value_from_json(_Line, found, "cached")
    except (ValueError, RecursionError, ManifestInvalid) as error:
        raise EvaluationError(
            f"{place} is no answer of an evaluation ({error}); give another file, or delete this one to start anew"
        ) from error
