"""The answers of training examples, in bundles that keep texts."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import TaskSpec

#: Bytes that are read at once to see where lines end, and those of all lines that are read for one answer.
_CHUNK, _MOST_READ = 1 << 20, 1 << 20


class ExampleAnswers:
    """Answers by the key of their example, read from the file line by line when they are asked for.

    They are guesses of what an answer may be, so whatever cannot be read (a file that is gone, a line that is damaged,
    an example of a version that kept no answers) counts as none. In memory is where each line begins, 8 bytes a line.

    Args:
        path: JSON lines of `key`, `prompt` and `answer` in the order of their keys.
        tasks: those of the bundle, whose examples the lines are.
    """

    def __init__(self, path: Path, tasks: Mapping[str, TaskSpec]) -> None:
        self._path = path
        spans = sorted((task.first_key, task.examples) for task in tasks.values())
        self._first_keys = [first for first, _ in spans]
        self._first_lines = np.cumsum([0, *(count for _, count in spans)]).tolist()
        self._ends = _line_ends(path)

    def read(self, keys: Iterable[int]) -> Iterator[str]:
        """The answers of examples, in the order of `keys`; examples without one are passed over.

        Lines are read up to a MiB together; the rest counts as none.
        """
        left = _MOST_READ
        try:
            with self._path.open("rb") as file:
                for key in keys:
                    start, end = self._place(key)
                    left -= end - start
                    if left < 0:
                        return
                    if end > start:
                        file.seek(start)
                        answer = _answer(file.read(end - start), key)
                        if answer is not None:
                            yield answer
        except OSError:
            return

    def _place(self, key: int) -> tuple[int, int]:
        """Where the line of an example begins and ends; the same twice where there is none."""
        span = bisect_right(self._first_keys, key) - 1
        if span < 0:
            return 0, 0
        line = self._first_lines[span] + key - self._first_keys[span]
        if line >= min(self._first_lines[span + 1], len(self._ends)):
            return 0, 0
        return int(self._ends[line - 1]) if line else 0, int(self._ends[line])


def _line_ends(path: Path) -> npt.NDArray[np.int64]:
    """Where each line of a file ends, behind its line feed; none where it cannot be read."""
    ends, start = [np.empty(0, np.int64)], 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + start + 1)
                start += len(chunk)
    except OSError:
        return np.empty(0, np.int64)
    return np.concatenate(ends)


def _answer(line: bytes, key: int) -> str | None:
    """The answer of a line, None where it is of another example, has none, or is no such line."""
    try:
        fields = json.loads(line)
        answer = fields.get("answer") if isinstance(fields, dict) and fields.get("key") == key else None
        if isinstance(answer, str):
            answer.encode("utf-8")  # half a surrogate pair is no text
            return answer
    except (ValueError, RecursionError):
        pass
    return None
