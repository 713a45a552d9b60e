"""The page of commands: every command of `edgecompose` and `edgecompose-export`, with its options."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import click

from docs.reference_generator.markdown import NOTE, anchor, escaped
from edgecompose.cli.main import main as runtime
from edgecompose_export.cli import main as export

_PROGRAMS: Mapping[str, click.Group] = MappingProxyType({"edgecompose": runtime, "edgecompose-export": export})


def cli_page() -> str:
    """Every command of both programs."""
    lines = [
        "# Commands",
        "",
        NOTE,
        "",
        "Results go to standard output, everything else to standard error. Exit code 0 is success, 1 an error that",
        "says what to do, 2 a usage error. Options without a default take the bundle's, or nothing.",
    ]
    commands = [(program, *entry) for program, group in _PROGRAMS.items() for entry in _commands(group, (program,))]
    for program in _PROGRAMS:
        names = (" ".join(path) for name, path, _ in commands if name == program)
        links = (f"[{name.removeprefix(f'{program} ')}](#{anchor(name)})" for name in names)
        lines += ["", f"`{program}`: " + ", ".join(links)]
    for _, path, command in commands:
        lines += ["", f"## {' '.join(path)}", "", *_command(path, command)]
    return "\n".join(lines)


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every visible command below a group, with the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        elif not command.hidden:
            yield (*path, name), command


def _command(path: Sequence[str], command: click.Command) -> list[str]:
    context = click.Context(command, info_name=" ".join(path))
    lines = ["```text", " ".join([*path, *command.collect_usage_pieces(context)]), "```", ""]
    for part in inspect.cleandoc(command.help or "").split("\n\n"):
        lines += [*(["```sh", *part.splitlines()[1:], "```"] if part.startswith("\b") else [escaped(part)]), ""]
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    lines += ["| option | default | |", "|---|---|---|", *(_option(option, context) for option in options)]
    return lines


def _option(option: click.Option, context: click.Context) -> str:
    """The row of an option."""
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    values = "" if option.is_flag else f" {_values(option)}"
    default = option.get_default(context)
    cell = "required" if option.required else "" if _is_empty(default) else _default(option, default)
    return f"| {names}{values} | {cell} | {escaped(option.help or '')} |"


def _is_empty(default: object) -> bool:
    """Whether an option has no default to show: it is unset, or a flag that is off."""
    return default is None or default is False or default == () or "UNSET" in repr(default)


def _default(option: click.Option, default: object) -> str:
    if option.is_flag and option.secondary_opts:
        return f"`{option.opts[0] if default else option.secondary_opts[0]}`"
    return f"`{default}`"


def _values(option: click.Option) -> str:
    """The values that an option takes."""
    kind = option.type
    if isinstance(kind, click.Choice):
        return " or ".join(f"`{choice}`" for choice in kind.choices)
    if option.metavar:
        return escaped(f"`{option.metavar}`")
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        noun = "integer" if isinstance(kind, click.IntRange) else "number"
        low = "" if kind.min is None else f"above {kind.min:g}" if kind.min_open else f"from {kind.min:g}"
        high = "" if kind.max is None else f"to {kind.max:g}"
        return " ".join(word for word in (noun, low, high) if word)
    return f"`{'PATH' if isinstance(kind, click.Path) else kind.name.upper()}`"
