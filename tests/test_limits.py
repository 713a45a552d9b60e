"""Limits that keep files and functions readable, for all code of the project."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("edgecompose", "export", "benchmarks", "tests", "docs", "packaging", "models")
FILES = {p.relative_to(ROOT).as_posix(): p for name in FOLDERS for p in sorted((ROOT / name).rglob("*.py"))}
MOST_LINES, MOST_FUNCTION_LINES, MOST_POSITIONAL = 350, 60, 3
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def parameters(function: Function, *, bound: bool) -> list[str | None]:
    """Annotations of the parameters that can be passed by position, as text."""
    arguments = [*function.args.posonlyargs, *function.args.args][1 if bound else 0 :]
    return [None if argument.annotation is None else ast.unparse(argument.annotation) for argument in arguments]


def is_static(function: Function) -> bool:
    return any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)


def callables(tree: ast.Module) -> Iterator[tuple[str, list[str | None]]]:
    """Functions, methods and classes of a module, with the annotations of what a call may pass by position."""
    methods = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            functions = [item for item in node.body if isinstance(item, Function)]
            methods |= {id(function) for function in functions}
            yield from ((f.name, parameters(f, bound=not is_static(f))) for f in functions if f.name != "__init__")
            creator = next((f for f in functions if f.name == "__init__"), None)
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            yield node.name, parameters(creator, bound=True) if creator else [ast.unparse(f.annotation) for f in fields]
    for node in ast.walk(tree):
        if isinstance(node, Function) and id(node) not in methods:
            yield node.name, parameters(node, bound=False)


@functools.cache
def signatures() -> dict[str, list[str | None]]:
    """Names that belong to one callable of ours only, with their annotations."""
    named: dict[str, list[list[str | None]]] = {}
    for path in FILES.values():
        for name, types in callables(tree_of(path)):
            named.setdefault(name, []).append(types)
    return {name: versions[0] for name, versions in named.items() if len(versions) == 1}


def crowded(call: ast.Call) -> str | None:
    """The type of which a call passes too many arguments by position, None where there is none."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", None)
    if len(call.args) <= MOST_POSITIONAL or any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    kinds = Counter(signatures().get(str(name), [])[: len(call.args)])
    return next((kind for kind, count in kinds.items() if kind is not None and count > MOST_POSITIONAL), None)


@pytest.mark.parametrize("name", FILES)
def test_files_functions_and_calls_are_short(name: str) -> None:
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    assert not any("# fmt:" in line for line in lines if name != "tests/test_limits.py")
    for node in ast.walk(tree_of(FILES[name])):
        if isinstance(node, Function):
            assert (node.end_lineno or 0) - node.lineno < MOST_FUNCTION_LINES, f"{node.name} is too long"
        if isinstance(node, ast.Call):
            assert crowded(node) is None, f"line {node.lineno} passes more than {MOST_POSITIONAL} {crowded(node)}"


@pytest.mark.parametrize(
    ("code", "kind"),
    [("make(1, 2, 3, 4)", "int"), ("make(1, 2, 3, d=4)", None), ("make(*values)", None), ("other(1, 2, 3, 4)", None)],
)
def test_a_crowded_call_is_known(code: str, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_limits.signatures", lambda: {"make": ["int"] * 4, "other": ["int", "str"] * 2})
    call = next(node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    assert crowded(call) == kind
