"""Links, names and paths in README.md and docs/ lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from docs.reference_generator.markdown import anchor
from tests.doc_pages import FENCE, PAGES, PROGRAMS, README, ROOT, name_of, parse


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_and_options_named_in_the_text_exist(path: Path) -> None:
    options = {name for group in PROGRAMS.values() for command in _all(group) for name in _options(command)}
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for code in re.findall(r"`([^`\n]+)`", text) if path.name != "log.md" else ():
        words = code.split()
        if words[0] in ("make", "pip"):
            parse(code)
        elif words[0] in PROGRAMS and len(words) > 1 and re.fullmatch(r"[\w-]+", words[1]) and words[1] != "--help":
            group = PROGRAMS[words[0]]
            command = group.get_command(click.Context(group), words[1])
            assert command is not None or words[1].startswith("-") or words[1].isupper(), code
            if command is not None and not isinstance(command, click.Group):
                value = {w.split("=")[0] for w in words if w.startswith("--")}
                assert value <= {*_options(command), "--help"}, code
        elif words[0].startswith("--") and path.parent.name != "reference":
            assert words[0].split("=")[0] in {*options, *_OTHERS_OPTIONS}, code


#: Options of programs that are not ours.
_OTHERS_OPTIONS = frozenset(
    ("--help", "--prefix", "--python", "--force", "--uninstall", "--lora", "--lora-modules", "--enable-lora", "--chat")
)


def _all(group: click.Group) -> Iterator[click.Command]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield from _all(command) if isinstance(command, click.Group) else (command,)


def _options(command: click.Command) -> list[str]:
    return [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]


def anchors(page: Path) -> set[str]:
    bare = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {anchor(heading.strip()) for heading in re.findall(r"^#+ (.*)$", bare, flags=re.MULTILINE)}


@pytest.mark.parametrize("path", (*PAGES, ROOT / "CHANGELOG.md", ROOT / "models" / "SOURCES.md"), ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"https?:", target):
            continue
        file, _, fragment = target.partition("#")
        result = path.parent / file if file else path
        assert result.exists(), target
        if fragment:
            assert fragment in anchors(result), target


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)", index.read_text("utf-8"))}
    assert {page.resolve() for page in PAGES} - {README.resolve(), index.resolve()} <= linked


def test_every_path_in_the_tree_exists() -> None:
    tree = re.search(r"```text\n(edgecompose/.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert tree is not None
    folder = ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
            assert (ROOT / name).is_dir(), name
        else:
            assert (ROOT / folder / name).exists(), f"{folder}{name}"
