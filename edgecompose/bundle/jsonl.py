"""JSON Lines files: read with a place for each line, or appended to by a run that can be resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from edgecompose.bundle.lock import lock
from edgecompose.bundle.records import decode_text
from edgecompose.errors import EdgeComposeError
from edgecompose.guard.filesystem import naming

_T = TypeVar("_T")
_LONGEST = 256 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_ARRAY = "begins a JSON array, expected one object a line; write each object on a line, without [ ] and commas between"


def read_lines(path: Path, error: type[EdgeComposeError]) -> Iterator[tuple[str, Any]]:
    """Place (`file:line`, for messages) and value of each line of a UTF-8 file; blank lines are skipped.

    A byte order mark is skipped. A line ends at `\\n`: JSON may hold other line separators.

    Args:
        error: the class of error to raise.

    Raises:
        error: a line is no UTF-8, no JSON, longer than 256 MiB, or holds half a surrogate pair; the message names it.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST + 1), b""), 1):
            place = f"{path}:{number}"
            if len(line) > _LONGEST:
                raise error(f"{place} is longer than {_LONGEST >> 20} MiB; expected one object a line")
            try:
                text = (decode_text(line) if number == 1 else line.decode("utf-8")).strip()
                value = json.loads(text) if text else None
                halves = "\\u" in text and _SURROGATE.search(json.dumps(value, ensure_ascii=False))
            except (ValueError, RecursionError) as reason:
                array = number == 1 and line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
                what = _ARRAY if array else f"is not JSON in UTF-8 ({reason!s:.200}); expected one object a line"
                raise error(f"{place} {what}") from reason
            if halves:
                raise error(f"{place} holds half a surrogate pair, which is no Unicode text; write the whole character")
            if number == 1 and isinstance(value, list) and value and isinstance(value[0], dict):
                raise error(f"{place} {_ARRAY}")
            if text:
                yield place, value


@dataclass(frozen=True, slots=True)
class ResumableFile(Generic[_T]):
    """A file that a run appends to, and the values of the lines that earlier runs wrote."""

    earlier: Sequence[_T]
    file: IO[bytes]

    def append(self, line: str) -> None:
        """Write a line of JSON; it is handed to the system before this returns."""
        self.file.write(line.encode("utf-8", "replace") + b"\n")
        self.file.flush()


@contextmanager
def open_resumable(
    path: Path, parse: Callable[[Any], _T], *, start: bytes, error: type[EdgeComposeError], content: str
) -> Iterator[ResumableFile[_T]]:
    """Open a file of JSON lines for appending; it is made where it is absent.

    A last line that an interrupted run left incomplete is cut off. Nothing changes in a file that holds something else.

    Args:
        parse: gives the value of a parsed line; raises EdgeComposeError, TypeError, ValueError or KeyError for others.
        start: how every line begins, by which an incomplete line is known.
        error: the class of error to raise.
        content: what a line is, for messages, such as 'result of a batch'.

    Raises:
        error: a line is something else; the message names it.
        InUse: another process is appending to it.
        OSError: the file cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.is_file() or not path.exists()
    with naming(path), lock(path) if plain else nullcontext(), path.open("a+b") as file:
        file.seek(0)
        earlier, end = [], 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and (line.startswith(start) or start.startswith(line)):
                break
            try:
                earlier.append(parse(json.loads(line)))
            except (EdgeComposeError, TypeError, ValueError, KeyError, RecursionError) as reason:
                raise error(
                    f"{path}:{number} is no {content} ({reason}); give another file, or delete this one to start anew"
                ) from reason
            end += len(line)
        file.truncate(end)
        yield ResumableFile(earlier, file)
