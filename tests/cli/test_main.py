"""The `edgecompose` command: what it prints where, and with which exit code."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path

import click
import pytest

from edgecompose import __version__
from edgecompose.cli.main import main
from tests.cli.calls import PROMPT, call, write_questions
from tests.fixtures_tiny import TinyZoo

COMMANDS = ("run", "chat", "batch", "serve", "retrieve", "compose", "eval", "inspect", "verify", "doctor", "bundle")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("run", "x"),
        ("unknown",),
        ("run", "x", "y", "--frobnicate"),
        ("run", "x", "y", "--neighbours", "0"),
        ("run", "x", "y", "--top-p", "0"),
        ("run", "x", "y", "--top-p", "1.5"),
        ("run", "x", "y", "--routing-temperature", "0"),
        ("run", "x", "y", "--density", "0"),
        ("run", "x", "y", "--method", "average"),
        ("compose", "x", "y"),
        ("run", "x", "y", "--device", "tpu"),
        ("run", "x", "y", "--max-tokens", "no"),
        ("run", "x", "y", "--seed=-1"),
        ("run", "{bundle}", "y", "--adapter", "animals"),
        ("run", "{bundle}", "y", "--adapter", "animals=much"),
        ("run", "{bundle}", "y", "--choices", "a,,b"),
        ("eval", "x"),
        ("eval", "x", "y", "--methods", "best"),
        ("eval", "x", "y", "--methods", "base,base"),
        ("eval", "x", "y", "--methods", ""),
        ("eval", "x", "y", "--limit", "0"),
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_exit_code_2(bundle: Path, arguments: tuple[str, ...]) -> None:
    done = call(*(a.format(bundle=bundle) for a in arguments))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Usage: " in done.stderr
    assert "Error: " in done.stderr


def examples_in(help_text: str) -> list[list[str]]:
    return [shlex.split(line) for line in map(str.strip, help_text.splitlines()) if line.startswith("edgecompose ")]


@pytest.mark.parametrize("command", ["bundle upgrade", *(name for name in COMMANDS if name != "bundle")])
def test_the_example_in_the_help_runs(
    zoo: TinyZoo, bundle: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edgecompose.cli.serve.run_server", lambda *args, **settings: click.echo("it would serve"))
    Path("models").mkdir()
    Path("models/demo").symlink_to(bundle)
    Path("build").mkdir()
    Path("build/checkpoint").symlink_to(zoo.model("llama"))
    write_questions(Path("questions.jsonl"))
    line = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": PROMPT}}
    Path("calls.jsonl").write_text(json.dumps(line), encoding="utf-8")
    shown = call(*command.split(), "--help")
    assert shown.exit_code == 0
    examples = examples_in(shown.stdout)
    assert examples
    for _, *arguments in examples:
        assert " ".join(arguments).startswith(command)
        stdin = b'{"jsonrpc": "2.0", "id": 1, "method": "models"}\n' if "--stdio" in arguments else b"hello\n"
        done = call(*arguments, stdin=stdin if command in ("chat", "serve") else None)
        assert done.exit_code == 0, done.output
        assert done.stdout


def test_the_help_names_every_command() -> None:
    shown = call("--help").stdout
    assert set(main.list_commands(click.Context(main))) == set(COMMANDS)
    assert all(f"\n  {command} " in shown for command in COMMANDS)
    assert call("-h").stdout == shown


def _is_installed() -> bool:
    return any(d.name == "edgecompose" for d in importlib.metadata.distributions())


def test_the_version_is_that_of_the_package() -> None:
    done = call("--version")
    assert done.exit_code == 0
    assert __version__ in done.stdout
