"""The command `chat`, by a pipe and at a terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgecompose import Chat
from edgecompose.cli.chat import _COMMAND
from tests.cli.calls import call, fault_of
from tests.cli.processes import Terminal, command, run_in_shell

#: It starts processes; `make check` leaves it out.
pytestmark = pytest.mark.slow

TALK = b"the cat sat on a mat\ntwo and two is four\n/new\n\n  \ntwo and two is four\n/exit\nnever read\n"


def test_a_chat_remembers_what_was_said(bundle: Path) -> None:
    done = call("chat", bundle, "--json", "--adapter", "animals=1", "--system", "be brief", stdin=TALK)
    assert (done.exit_code, done.stderr) == (0, "")
    first, second, alone = map(json.loads, done.stdout.splitlines())
    assert second["tokens"]["prompt"] > first["tokens"]["prompt"] > 0
    assert alone["prompt"] == second["prompt"] and alone["tokens"]["prompt"] < second["tokens"]["prompt"]
    shown = call("chat", bundle, "--explain", stdin=TALK)
    assert shown.exit_code == 0 and shown.stderr.count("composition") == 3
    assert fault_of("chat", bundle, stdin=b"caf\xe9\n").startswith("standard input is not UTF-8")


def test_commands_are_explained_and_not_sent(bundle: Path) -> None:
    done = call("chat", bundle, "--json", stdin=b"/help\n/?\n/model big\n /new\n/etc/passwd?\n/bye\n")
    assert done.exit_code == 0
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["/new", "/etc/passwd?"]
    assert done.stderr.count("begin another conversation") == 2
    assert "'/model' is no command; /help lists them" in done.stderr


@pytest.mark.parametrize(
    ("text", "is_command"),
    [
        ("/new", True),
        ("/new ", True),
        ("/model big", True),
        ("/?", True),
        (" /new", False),
        ("/etc/passwd", False),
        ("/", False),
        ("/new\nand more", False),
        ("a /new", False),
    ],
)
def test_a_line_is_a_command_or_a_message(text: str, is_command: bool) -> None:
    assert (_COMMAND.fullmatch(text) is not None) == is_command


def test_an_answer_that_was_cut_is_told(bundle: Path) -> None:
    done = call("chat", bundle, "--max-tokens", 1, stdin=b"hello\n")
    assert "edgecompose: the answer was cut at 1 tokens, by --max-tokens or the context" in done.stderr


def test_an_interruption_of_a_piped_chat_ends_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Chat, text: str, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "say", interrupt)
    assert call("chat", bundle, stdin=b"hello\n").exit_code == 130


@pytest.fixture
def terminal(bundle: Path) -> Iterator[Terminal]:
    with Terminal(command("chat", bundle, "--device", "cpu")) as opened:
        opened.wait_for("/exit or Ctrl-D leaves.")
        opened.wait_for("> ")
        yield opened


def test_a_person_talks_at_a_terminal(terminal: Terminal) -> None:
    terminal.type("/help\r")
    assert "begin another conversation" in terminal.wait_for("> ")
    terminal.type("\r")
    terminal.wait_for("> ")
    terminal.type("helo\x1b[Dl\r")
    assert "helo" in terminal.wait_for("> ")
    terminal.type("\x1b[200~the cat sat\r\ron a mat\x1b[201~\r")
    terminal.wait_for("> ")
    terminal.type("/new\r")
    terminal.wait_for("> ")
    terminal.type("/xyz\r")
    assert "'/xyz' is no command" in terminal.wait_for("> ")
    terminal.type("x " * 600 + "\r")
    assert "edgecompose: " in terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.shown


def test_control_c_leaves_at_the_second_time(terminal: Terminal) -> None:
    terminal.type("\x03")
    assert "Ctrl-C once more" in terminal.wait_for("> ")
    terminal.type("\x03")
    assert terminal.exit_code() == 130
    assert "Traceback" not in terminal.shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_a_chat_at_its_prompt(terminal: Terminal, number: int) -> None:
    os.kill(terminal.pid, number)
    assert terminal.exit_code() == 128 + number
    assert "Traceback" not in terminal.shown


#: The command, with a pause after each chunk of an answer.
SLOW = """
import sys, time
from edgecompose.chat import Chat
say = Chat.say
def slow(self, text, *, on_text, cancellation):
    return say(self, text, on_text=lambda chunk: (on_text(chunk), time.sleep(0.1)), cancellation=cancellation)
Chat.say = slow
from edgecompose.__main__ import main
main()
"""


def test_control_c_ends_an_answer_and_keeps_the_conversation(bundle: Path) -> None:
    options = ("--device", "cpu", "--max-tokens", "400", "--sample", "--temperature", "9")
    with Terminal([sys.executable, "-c", SLOW, "chat", str(bundle), *options]) as terminal:
        terminal.wait_for("> ")
        for _ in range(2):
            terminal.type("the cat sat on a mat\r")
            terminal.wait_for("\x1b[?2004l\r")
            length = len(terminal.shown)
            while len(terminal.shown) == length:
                terminal.read()
            terminal.type("typed")
            terminal.type("\x03")
            assert "typed" not in terminal.wait_for("edgecompose: the answer was ended")
            terminal.wait_for("> ")
        terminal.type("/exit\r")
        assert terminal.exit_code() == 0
        assert "Traceback" not in terminal.shown


def test_a_chat_without_input_ends(bundle: Path) -> None:
    assert run_in_shell("</dev/null", "chat", bundle) == (0, "", "")
