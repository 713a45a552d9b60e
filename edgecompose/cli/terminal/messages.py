"""Reads the messages of a conversation: lines of a pipe, or what a person types and pastes at a terminal."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import select
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import NoReturn, Protocol

import click

from edgecompose.cli.terminal import signals
from edgecompose.cli.terminal.streams import read_input_line
from edgecompose.errors import EdgeComposeError

_PROMPT, _MORE = "> ", "... "
#: Begins and ends a message of several lines.
_QUOTES = '"""'
#: Seconds after the end of a line within which more input is a part of the same pasted text.
_PASTE_GAP = 0.03
#: The end of input as a terminal sends it, by mode.
_ENDS = "\x04\0"
_ERASES = "\x7f\b"
_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|.)?", re.DOTALL)


class Messages(Protocol):
    """Where messages come from."""

    def read(self) -> str | None:
        """The next message, which is not blank, or None at the end."""

    def answering(self) -> contextlib.AbstractContextManager[None]:
        """Surrounds the answer to a message."""


class PipedMessages:
    """Each line of standard input that is not blank is a message."""

    def read(self) -> str | None:
        """The next message, None at the end of the input."""
        line = read_input_line()
        while line is not None and not line.strip():
            line = read_input_line()
        return line

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Do nothing."""
        yield


class TerminalMessages:
    """Messages of a person at a terminal, with line editing and a history where Python has readline.

    A pasted text is one message, however many lines it has. What is typed during an answer does not show in it: whole
    lines are the next message, the rest is in the line that is edited next.

    Args:
        is_command: whether a line is a command, which is never a part of a message.
    """

    def __init__(self, is_command: Callable[[str], bool]) -> None:
        self._is_command = is_command
        self._readline = _module("readline")
        self._termios = _module("termios")
        self._lines: deque[str] = deque()
        self._begun = ""
        self._ended = False
        self._line_was_empty = True
        if self._readline is not None and "libedit" not in (self._readline.__doc__ or ""):
            self._readline.parse_and_bind("set enable-bracketed-paste on")
            self._readline.parse_and_bind(r'"\e[200~": bracketed-paste-begin')

    def __enter__(self) -> TerminalMessages:
        return self

    def __exit__(self, *error: object) -> None:
        """Drop what was typed and not read, which would go to the shell."""
        if self._termios is not None:
            with contextlib.suppress(self._termios.error):
                self._termios.tcflush(0, self._termios.TCIFLUSH)

    def read(self) -> str | None:
        """The next message, None at the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C came twice at an empty line; once, or in a line, it clears what was written.
            EdgeComposeError: a line is not Unicode.
        """
        was_interrupted = False
        while True:
            try:
                message = self._message()
            except EOFError:
                click.echo(err=True)
                return None
            except KeyboardInterrupt:
                if was_interrupted and self._line_was_empty:
                    raise
                click.echo(err=True)
                if self._line_was_empty:
                    click.echo("(Ctrl-C once more, Ctrl-D or /exit leaves)", err=True)
                was_interrupted = self._line_was_empty
                self._lines.clear()
                continue
            if message.strip():
                return message

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Show nothing of what is typed, and keep it."""
        with self._unseen():
            try:
                yield
            finally:
                self._keep(0)

    def _message(self) -> str:
        line = self._line(_PROMPT)
        is_pasted = self._keep(_PASTE_GAP)
        if self._is_command(line):
            return line
        if is_pasted and self._begun:  # a pasted text whose last line has no end is edited before it is sent
            self._begun = "\n".join([line, *self._lines, self._begun])
            self._lines.clear()
            return self._message()
        lines = [line]
        if line.startswith(_QUOTES):
            lines[0] = line[len(_QUOTES) :]
            while not lines[-1].rstrip().endswith(_QUOTES):
                lines.append(self._line(_MORE))
            lines[-1] = lines[-1].rstrip()[: -len(_QUOTES)]
        else:
            while self._lines and not self._is_command(self._lines[0]):
                lines.append(self._line(_MORE))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        """The next line, out of what is there already or from the terminal.

        Raises:
            EOFError: at the end of the input.
        """
        if self._lines:
            click.echo(f"{prompt}{self._lines[0]}", err=not sys.stdout.isatty())
            return self._lines.popleft()
        if self._ended:
            raise EOFError
        begun, self._begun = self._begun, ""
        with self._interruptible():
            if sys.stdout.isatty():
                return self._edited_line(prompt, begun)
            click.echo(f"{prompt}{begun}", nl=False, err=True)
            try:
                line = read_input_line()
            except EdgeComposeError as error:  # nobody can try again where the terminal is gone
                raise (error.__cause__ if isinstance(error.__cause__, OSError) else error) from None
        if line is None:
            raise EOFError
        return begun + line

    def _edited_line(self, prompt: str, begun: str) -> str:
        if begun and self._readline is not None:
            self._readline.set_startup_hook(functools.partial(self._readline.insert_text, begun))
            begun = ""
        try:
            return begun + input(f"{prompt}{begun}")
        except UnicodeDecodeError as error:
            raise EdgeComposeError(f"the line is not {error.encoding} ({error.reason}); write it again") from error
        finally:
            if self._readline is not None:
                self._readline.set_startup_hook(None)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Note at Ctrl-C whether there is something in the line."""

        def interrupt(number: int, frame: FrameType | None) -> NoReturn:
            self._line_was_empty = self._readline is None or not self._readline.get_line_buffer()
            raise KeyboardInterrupt

        with signals.handling(signal.SIGINT, interrupt):
            yield

    def _keep(self, gap: float) -> bool:
        """Take what was typed, or pasted without brackets, and not read; whether there was any.

        Args:
            gap: seconds to wait for it.
        """
        if self._termios is None:
            return False
        content = b""
        with self._unseen():
            while select.select([0], [], [], gap)[0] and (more := os.read(0, 1 << 16)):
                content += more
        if not content:
            return False
        text, self._ended = _typed(self._begun + content.decode(errors="replace"))
        *lines, self._begun = text.split("\n")
        self._lines.extend(lines)
        return True

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """Let the terminal neither show what is typed nor hold it back until the line ends."""
        if self._termios is None:
            yield
            return
        termios = self._termios
        try:
            before, mode = termios.tcgetattr(0), termios.tcgetattr(0)
            mode[3] &= ~(termios.ECHO | termios.ICANON)
            termios.tcsetattr(0, termios.TCSADRAIN, mode)
        except termios.error as error:
            raise OSError(*error.args) from error
        try:
            yield
        finally:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, before)


def _typed(text: str) -> tuple[str, bool]:
    """What keys lead to in a line that nobody edits, and whether the end of the input is among them."""
    kept: list[str] = []
    for character in _ESCAPE.sub("", text.replace("\r\n", "\n").replace("\r", "\n")):
        if character in _ENDS:
            return "".join(kept), True
        if character in _ERASES:
            if kept and kept[-1] != "\n":
                kept.pop()
        elif character in "\n\t" or character.isprintable():
            kept.append(character)
    return "".join(kept), False


def _module(name: str) -> ModuleType | None:
    """A module of the standard library that not every system has."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
