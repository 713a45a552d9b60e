"""The command `chat`."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from edgecompose import serialize
from edgecompose.cancellation import Cancellation
from edgecompose.chat import Chat
from edgecompose.cli.options import (
    adapter_option,
    bundle_argument,
    device_option,
    generation_options,
    json_option,
    kept_prompts,
    kv_cache_option,
    merge_options,
    open_composer,
    print_json,
    prompt_cache_bytes_option,
    prompt_cache_option,
    request_of,
    retrieval_options,
)
from edgecompose.cli.run import print_notes
from edgecompose.cli.terminal import signals
from edgecompose.cli.terminal.errors import one_line
from edgecompose.cli.terminal.messages import Messages, PipedMessages, TerminalMessages
from edgecompose.errors import Cancelled, EdgeComposeError
from edgecompose.request import Answer

#: Command in a conversation -> what it does.
_COMMANDS: Mapping[str, str] = MappingProxyType(
    {"/new": "new", "/clear": "new", "/help": "help", "/?": "help", "/exit": "exit", "/quit": "exit", "/bye": "exit"}
)
#: A line like this is a command, known or not; a path is none, nor is a text of several lines.
_COMMAND = re.compile(r"/[\w?-]+( .*)?\s*")
_WELCOME = "Type a message. /help lists commands, /exit or Ctrl-D leaves."
_HELP = """\
/new     begin another conversation (also /clear)
/help    show this (also /?)
/exit    leave (also /quit, /bye, Ctrl-D)
\"\"\"      begin and end a message of several lines; a pasted text is one message
Ctrl-C   end an answer; clear the line
A blank before a / sends it as a message."""


@click.command()
@bundle_argument
@click.option("--system", metavar="TEXT", help="Message that the conversation begins with.")
@click.option(
    "--route-by",
    type=click.Choice(["last", "first"]),
    default="last",
    show_default=True,
    help="The message that adapters are chosen by: the last, anew at each turn, or the first.",
)
@retrieval_options
@adapter_option
@merge_options
@generation_options
@click.option("--explain", is_flag=True, help="Explain each answer on standard error.")
@device_option
@kv_cache_option
@prompt_cache_option
@prompt_cache_bytes_option
@json_option
def chat(
    bundle: Path, system: str | None, explain: bool, device: str, kv_cache: str, as_json: bool, **options: Any
) -> None:
    """Talk: each line of standard input is a message; history is kept, adapters are chosen at each turn.

    At a terminal lines can be edited, a pasted text is one message, and Ctrl-C ends an answer. /help lists commands:
    /new begins another conversation, /exit leaves, and so does the end of the input.

    \b
    edgecompose chat models/demo
    printf 'Hello!\\nWho are you?\\n' | edgecompose chat models/demo --json
    """
    file, limit = options.pop("prompt_cache"), options.pop("prompt_cache_bytes")
    with open_composer(bundle, device, kv_cache=kv_cache) as composer, kept_prompts(composer, file, limit):
        talk = Chat(composer, request_of(composer, {**options, "truncate": True}), system=system)
        if not sys.stdin.isatty():
            _Session(talk, PipedMessages(), explain=explain, as_json=as_json).run()
            return
        click.echo(_WELCOME, err=True)
        with (
            signals.handling(signal.SIGINT, lambda number, frame: None),  # beside answers and the prompt
            TerminalMessages(lambda line: _COMMAND.fullmatch(line) is not None) as messages,
        ):
            _TerminalSession(talk, messages, explain=explain, as_json=as_json).run()


class _Session:
    """Answers messages until they end; the first error ends it."""

    def __init__(self, talk: Chat, messages: Messages, *, explain: bool, as_json: bool) -> None:
        self.talk, self.messages = talk, messages
        self.explain, self.as_json = explain, as_json

    def run(self) -> None:
        """Read and answer."""
        while (message := self.next_message()) is not None:
            if not _COMMAND.fullmatch(message):
                self.answer(message.strip(), Cancellation())
            elif not self.command(message.split()[0]):
                return

    def next_message(self) -> str | None:
        """The next message, None after the last."""
        return self.messages.read()

    def command(self, name: str) -> bool:
        """Do what a command says; whether the conversation goes on."""
        action = _COMMANDS.get(name)
        if action == "new":
            self.talk.reset()
        elif action == "help":
            click.echo(_HELP, err=True)
        elif action is None:
            click.echo(
                f"edgecompose: '{one_line(name)}' is no command; /help lists them, a blank before it sends it", err=True
            )
        return action != "exit"

    def answer(self, text: str, cancellation: Cancellation) -> None:
        """Answer a message, and print the answer as it is written.

        Raises:
            Cancelled: it was ended through `cancellation`.
            EdgeComposeError: the message cannot be answered.
        """
        answer = self.talk.say(text, on_text=self._print_chunk, cancellation=cancellation)
        if self.as_json:
            print_json(serialize.answer_json(answer))
        else:
            click.echo()
            _say_whether_it_was_cut(answer)
        print_notes(answer, explain=self.explain)

    def _print_chunk(self, text: str) -> None:
        if not self.as_json:
            click.echo(text, nl=False)


class _TerminalSession(_Session):
    """A conversation with a person: Ctrl-C ends an answer, an error the turn, and the conversation goes on."""

    def run(self) -> None:
        """Read and answer."""
        while True:
            try:
                super().run()
                return
            except EdgeComposeError as error:
                click.echo(f"edgecompose: {one_line(str(error))}", err=True)

    def next_message(self) -> str | None:
        """The next message; the last answer is read again while it is typed."""
        typed = threading.Event()

        def read_ahead() -> None:
            with contextlib.suppress(EdgeComposeError):  # the next turn reads all by itself then
                while not typed.is_set() and self.talk.read_ahead():
                    pass

        reader = threading.Thread(target=read_ahead, name="edgecompose-read-ahead", daemon=True)
        reader.start()
        try:
            return self.messages.read()
        finally:
            typed.set()
            reader.join()

    def answer(self, text: str, cancellation: Cancellation) -> None:
        """Answer a message; what is typed meanwhile does not show."""
        try:
            with self.messages.answering(), _ended_by_interrupt(cancellation):
                super().answer(text, cancellation)
        except (Cancelled, KeyboardInterrupt):
            click.echo()
            click.echo("edgecompose: the answer was ended", err=True)


@contextlib.contextmanager
def _ended_by_interrupt(cancellation: Cancellation) -> Iterator[None]:
    """End an answer at the first SIGINT between its steps, at the next one wherever it is."""

    def interrupt(number: int, frame: object) -> None:
        if cancellation.cancelled:
            raise KeyboardInterrupt
        cancellation.cancel()

    with signals.handling(signal.SIGINT, interrupt):
        yield


def _say_whether_it_was_cut(answer: Answer) -> None:
    if answer.finish == "length":
        tokens = answer.generated_tokens
        click.echo(f"edgecompose: the answer was cut at {tokens} tokens, by --max-tokens or the context", err=True)
