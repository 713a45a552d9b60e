"""The `edgecompose` command: the table of its commands. Results go to stdout, talk to stderr."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

import click

from edgecompose import __version__
from edgecompose.cli.terminal.errors import ErrorGroup

#: Command -> its module in this folder, and the beginning of its help. A module is imported when its command
#: runs.
COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "batch": ("serve", "Answer CALLS, a file of OpenAI API calls"),
        "bundle": ("bundle", "Change a bundle: add and remove tasks, convert an older one"),
        "chat": ("chat", "Talk: each line of standard input is a message"),
        "compose": ("compose", "Write the blend for PROMPT for another program"),
        "doctor": ("inspect", "Show versions, providers, the device that is chosen and why, and what is wrong"),
        "eval": ("evaluate", "Measure how often answers are right on your own examples"),
        "inspect": ("inspect", "Show what is in a bundle: base, embedder, tasks, adapters, defaults"),
        "retrieve": ("run", "Show which tasks PROMPT resembles, without answering it"),
        "run": ("run", "Answer PROMPT ('-' reads standard input): retrieve, weigh, merge, generate"),
        "serve": ("serve", "Serve the OpenAI API, and a chat page"),
        "verify": ("inspect", "Check every file of a bundle against its manifest"),
    }
)


class _Commands(ErrorGroup):
    """The commands of the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the alphabet's order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, None where there is none."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"edgecompose.cli.{COMMANDS[cmd_name][0]}")
        values = vars(module).values()
        return next(value for value in values if isinstance(value, click.Command) and value.name == cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, out of the table: `--help` imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgecompose")
def main() -> None:
    """Answer a prompt with a base model and a blend of LoRA adapters chosen by retrieval, offline."""
