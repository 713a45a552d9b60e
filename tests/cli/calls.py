"""Calls of the command, and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from edgecompose.cli.main import main
from tests.fixtures_tiny import TASKS

PROMPT = TASKS["animals"][0]
RETRIEVAL_KEYS = {"weights", "resemblance", "neighbours", "distribution"}


def call(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), input=stdin)


def result_of(*arguments: object, stdin: bytes | None = None) -> Any:
    """The JSON object that a command prints, which is all that it prints."""
    done = call(*arguments, "--json", stdin=stdin)
    assert (done.exit_code, done.stderr.strip()) == (0, ""), done.output
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def fault_of(*arguments: object, stdin: bytes | None = None) -> str:
    """The one line on stderr of a command that fails on purpose; nothing is on stdout."""
    done = call(*arguments, stdin=stdin)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("edgecompose: ")
    return line.removeprefix("edgecompose: ")


def write_questions(path: Path, *more: Any) -> Path:
    """Two examples of each task of the bundle, one of another."""
    rows = [
        {"task": task, "prompt": f"{prompt}, is it?", "answer": "yes", "choices": ["yes", "no"]}
        for task, prompts in TASKS.items()
        for prompt in prompts[:2]
    ]
    rows += [{"task": "birds", "prompt": "which bird sings?", "answer": "a lark", "aliases": ["lark"]}, *more]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
