"""Messages of a pipe, and of a person at a terminal."""

from __future__ import annotations

import io
import os
import signal
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgecompose.cli.terminal.messages import PipedMessages, _typed
from edgecompose.errors import EdgeComposeError
from tests.cli.processes import Terminal

#: Shows each message; to answer 'slow' takes a second.
CHILD = """
import os, sys, time
from edgecompose.cli.terminal import signals
from edgecompose.cli.terminal.messages import TerminalMessages
signals.exit_at_once()
with signals.unwinding(), TerminalMessages(lambda line: line.startswith("/")) as messages:
    while (message := messages.read()) is not None:
        with messages.answering():
            if message == "slow":
                print("BEGUN", flush=True)
                time.sleep(1)
            print("GOT", ascii(message), flush=True)
print("END")
"""
PASTED = "\x1b[200~First paragraph.\r\r\tSecond.\r\x1b[201~"


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal([sys.executable, "-c", CHILD]) as opened:
        opened.wait_for("> ")
        yield opened


def got(terminal: Terminal) -> str:
    terminal.wait_for("GOT '")
    return terminal.wait_for("'\r\n")[: -len("'\r\n")]


def test_a_line_is_edited_and_remembered(terminal: Terminal) -> None:
    terminal.type("helo\x1b[Dl\x1b[H>\x1b[F!\r")
    assert got(terminal) == ">hello!"
    terminal.wait_for("> ")
    terminal.type("other\x15\x1b[A\r")
    assert got(terminal) == ">hello!"


def test_a_pasted_text_is_one_message_that_enter_sends(terminal: Terminal) -> None:
    terminal.type(PASTED)
    terminal.type("and more\r")
    assert got(terminal) == r"First paragraph.\n\n\tSecond.\nand more"


def test_a_text_that_is_pasted_without_brackets_is_one_message(terminal: Terminal) -> None:
    terminal.type("First paragraph.\r\rSecond.\r")
    assert got(terminal) == r"First paragraph.\n\nSecond."
    terminal.wait_for("> ")
    terminal.type("Third.\r\rFourth")  # the last line has no end, so nothing is sent
    terminal.wait_for("Fourth")
    terminal.type("h\r")
    assert got(terminal) == r"Third.\n\nFourthh"


def test_commands_in_a_paste_are_no_part_of_a_message(terminal: Terminal) -> None:
    terminal.type("one\rtwo\r/new\rthree\r\x04")
    assert [got(terminal) for _ in range(3)] == [r"one\ntwo", "/new", "three"]
    terminal.wait_for("END")
    assert terminal.exit_code() == 0


def test_quotes_begin_and_end_a_message_of_several_lines(terminal: Terminal) -> None:
    terminal.type('"""one\r')
    terminal.wait_for("... ")
    terminal.type("\r")
    terminal.wait_for("... ")
    terminal.type('two"""\r')
    assert got(terminal) == r"one\n\ntwo"
    terminal.wait_for("> ")
    terminal.type('"""three"""\r')
    assert got(terminal) == "three"


def test_an_empty_line_is_no_message_and_no_end(terminal: Terminal) -> None:
    terminal.type("\r")
    terminal.wait_for("> ")
    terminal.type("  \r")
    terminal.wait_for("> ")
    terminal.type("word\r")
    assert got(terminal) == "word"


def test_what_is_typed_during_an_answer_is_not_shown_and_is_kept(terminal: Terminal) -> None:
    terminal.type("slow\r")
    terminal.wait_for("BEGUN\r\n")
    terminal.type("next\x1b[A messagf\x7fe\rand the begin")
    assert got(terminal) == "slow"
    assert terminal.wait_for("> next message").endswith("> next message")
    assert "next" not in terminal.shown[: terminal.shown.index("GOT 'slow'")]
    assert got(terminal) == "next message"
    terminal.wait_for("> and the begin")
    terminal.type("ning\r")
    assert got(terminal) == "and the beginning"


def test_control_c_clears_the_line_and_leaves_at_the_second_empty_one(terminal: Terminal) -> None:
    for _ in range(3):
        terminal.type("some text")
        terminal.wait_for("some text")
        terminal.type("\x03")
        terminal.wait_for("> ")
    terminal.type("word\r")
    assert got(terminal) == "word"
    terminal.wait_for("> ")
    terminal.type("\x03")
    terminal.wait_for("leaves)")
    terminal.wait_for("> ")
    terminal.type("\x03")
    assert terminal.exit_code() == -signal.SIGINT  # Python's own end, as no command is around the messages
    assert "KeyboardInterrupt" in terminal.shown


def test_the_terminal_is_left_as_it_was(terminal: Terminal) -> None:
    before = termios.tcgetattr(terminal.descriptor)
    assert not before[3] & termios.ECHO  # readline shows what is typed
    terminal.type("slow\r")
    terminal.wait_for("BEGUN")
    assert not termios.tcgetattr(terminal.descriptor)[3] & (termios.ECHO | termios.ICANON)
    got(terminal)
    terminal.wait_for("> ")
    terminal.type("\x04")
    terminal.wait_for("END")
    assert terminal.exit_code() == 0


def test_no_message_goes_to_the_program_that_comes_after() -> None:
    """What stays in a terminal when the chat ends would be run by the shell."""
    code = f"{CHILD}\nimport select\nprint('LEFT', select.select([0], [], [], 0.2)[0])"
    with Terminal([sys.executable, "-c", code]) as terminal:
        terminal.wait_for("> ")
        terminal.type("/first\r\x04echo run me\r")
        terminal.wait_for("LEFT []")


def test_without_readline_a_paste_is_one_message_and_nothing_is_lost() -> None:
    code = f"import sys; sys.modules['readline'] = None\n{CHILD}"
    with Terminal([sys.executable, "-c", code]) as terminal:
        terminal.wait_for("> ")
        terminal.type("First paragraph.\r\rSecond.\r")
        assert got(terminal) == r"First paragraph.\n\nSecond."
        terminal.wait_for("> ")
        terminal.type("slow\r")
        terminal.wait_for("BEGUN")
        terminal.type("one\rtw")
        assert [got(terminal), got(terminal)] == ["slow", "one"]
        terminal.wait_for("> tw")
        terminal.type("o\r")
        assert got(terminal) == "two"
        terminal.type("\x04")
        terminal.wait_for("END")


def test_an_output_that_goes_elsewhere_holds_no_prompt(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with Terminal(["/bin/sh", "-c", f'exec "$0" -c "$1" >{output}', sys.executable, CHILD]) as terminal:
        terminal.wait_for("> ")
        terminal.type("one\rtwo\r")
        terminal.wait_for("> ")
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    assert output.read_text(encoding="utf-8") == "GOT 'one\\ntwo'\nEND\n"


def test_a_window_of_another_size_changes_nothing(terminal: Terminal) -> None:
    termios.tcsetwinsize(terminal.descriptor, (10, 20))
    os.kill(terminal.pid, signal.SIGWINCH)
    terminal.type("word " * 9 + "\r")
    assert got(terminal) == ("word " * 9)


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (b"one\n\n \ntwo", ["one", "two"]),
        (b"one\r\n/new\r\n", ["one", "/new"]),
        (b"", []),
        ("\N{ZERO WIDTH NO-BREAK SPACE}été\n".encode(), ["été"]),
    ],
)
def test_each_line_of_a_pipe_is_a_message(content: bytes, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    piped = PipedMessages()
    with piped.answering():
        assert list(iter(piped.read, None)) == messages


def test_a_line_of_a_pipe_that_is_not_unicode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    with pytest.raises(EdgeComposeError, match="not UTF-8"):
        PipedMessages().read()


@pytest.mark.parametrize(
    ("keys", "text", "ends"),
    [
        ("a\r\nb\rc", "a\nb\nc", False),
        ("ab\x7f\x7f\x7fc", "c", False),
        ("a\n\x7fb", "a\nb", False),
        ("a\x1b[1;5Db\x1bOAc\x1b", "abc", False),
        ("a\x04b", "a", True),
        ("\0", "", True),
        ("a\x01\x02\tb猫", "a\tb猫", False),
    ],
)
def test_keys_that_nobody_edits_become_text(keys: str, text: str, ends: bool) -> None:
    assert _typed(keys) == (text, ends)
