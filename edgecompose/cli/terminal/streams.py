"""Standard input, output and error as a program meets them: closed, full, in any encoding."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from edgecompose.errors import EdgeComposeError

#: Largest prompt that standard input may hold, in bytes.
_MOST_BYTES = 64 << 20
_OUTPUT = "standard output"


def prepare_streams() -> None:
    """Give the process three open standard streams, each of which takes any character.

    A closed input or output becomes one that fails when it is used, a closed error one that takes everything: no file
    that is opened later gets its descriptor. Characters that the encoding of the output lacks are replaced. What cannot
    be written to standard error is passed over: an answer matters more than what is said about it.
    """
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_reserve(0, os.O_WRONLY)), "utf-8")
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_reserve(1, os.O_RDONLY)), "utf-8")
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(_reserve(2, os.O_RDWR)), "utf-8")
    sys.stdout, sys.stderr = _remade(sys.stdout, _Output), _remade(sys.stderr, _Messages)


def _remade(stream: TextIO, kind: type[io.TextIOWrapper]) -> TextIO:
    """A stream of another class over the same file."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    encoding, lines, at_once = stream.encoding, stream.line_buffering, stream.write_through
    errors = "replace" if stream.errors == "strict" else stream.errors
    return kind(stream.detach(), encoding, errors, line_buffering=lines, write_through=at_once)


class OutputClosed(BrokenPipeError):
    """Nobody reads standard output any more. It has no `errno`, at which click would exit by itself."""


class _Output(io.TextIOWrapper):
    """Standard output, which errors of writing name as the place."""

    def write(self, text: str, /) -> int:
        """Write the text."""
        with _naming_output():
            return super().write(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with _naming_output():
            super().flush()


class _Messages(io.TextIOWrapper):
    """Standard error, which passes over what cannot be written."""

    def write(self, text: str, /) -> int:
        """Write the text, where that is possible."""
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, where that is possible."""
        with contextlib.suppress(OSError):
            super().flush()


@contextmanager
def _naming_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise OutputClosed(_OUTPUT) from error
    except OSError as error:
        error.filename = _OUTPUT
        raise


def discard_output() -> None:
    """Send what is still buffered for standard output nowhere, or Python would fail once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def read_input() -> str:
    """The text of standard input, without a byte order mark and without line ends at its end.

    Raises:
        EdgeComposeError: it is closed, cannot be read, is too long or not UTF-8.
    """
    return _text_of(_read(sys.stdin.buffer.read)).rstrip("\r\n")


def read_input_line() -> str | None:
    """The next line of standard input without its end, None after the last.

    Raises:
        EdgeComposeError: as `read_input`.
    """
    content = _read(sys.stdin.buffer.readline)
    return _text_of(content).rstrip("\r\n") if content else None


def _read(read: Callable[[int], bytes]) -> bytes:
    try:
        content = read(_MOST_BYTES + 1)
    except OSError as error:
        raise EdgeComposeError(
            f"standard input cannot be read ({error.strerror}); expected a pipe, a file or a terminal"
        ) from error
    if len(content) > _MOST_BYTES:
        raise EdgeComposeError(f"standard input has more than {_MOST_BYTES >> 20} MiB; give a shorter text")
    return content


def _text_of(content: bytes) -> str:
    """The text of standard input."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EdgeComposeError(f"standard input is not UTF-8 ({error}); give UTF-8 text") from error


def json_line(value: dict[str, Any]) -> str:
    """A value as one line of JSON; characters that standard output cannot take are escaped."""
    import json  # 3 ms, which `--help` does without

    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return line


def _reserve(descriptor: int, flags: int) -> io.FileIO:
    """The null device as a standard descriptor that was closed."""
    opened = os.open(os.devnull, flags)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    os.set_inheritable(descriptor, True)
    return io.FileIO(descriptor, "r" if descriptor == 0 else "w", closefd=False)
