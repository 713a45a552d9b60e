"""The pages of the documentation, and the programs that they call."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose.cli.main import main as runtime
from edgecompose_export.cli import main as export

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))
PROGRAMS: dict[str, click.Group] = {"edgecompose": runtime, "edgecompose-export": export}
FENCE = re.compile(r"^```(\w*) ?(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def parse(line: str) -> None:
    """Check as much of a command line as can be without running it: targets, extras, commands and options."""
    words = shlex.split(line, comments=True)
    program = words[0].rpartition("/")[2]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in words[1:]:
            name, is_variable, _ = word.partition("=")
            assert re.search(rf"^{name} \?=" if is_variable else rf"^{name}:", makefile, flags=re.MULTILINE), line
    elif program == "pip":
        for name, result in re.findall(r"([\w./-]+)\[([\w,]+)\]", line):
            file = ROOT / {"edgecompose": ".", ".": ".", "./export": "export"}[name] / "pyproject.toml"
            extras = tomllib.loads(file.read_text("utf-8"))["project"]["optional-dependencies"]
            assert set(result.split(",")) <= set(extras), line
    elif program in PROGRAMS:
        command: click.Command = PROGRAMS[program]
        arguments = words[1:]
        while isinstance(command, click.Group):
            _, result, arguments = command.resolve_command(click.Context(command), arguments)
            assert result is not None
            command = result
        with command.make_context(command.name, arguments):
            pass
