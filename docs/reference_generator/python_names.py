"""The page of Python names: what `import edgecompose` offers, with signatures, fields and docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

import edgecompose
from docs.reference_generator.markdown import NOTE, anchor, code, escaped
from edgecompose import errors, request
from edgecompose.engine.device import Device
from edgecompose.engine.merged import MergeReport
from edgecompose.generation.decode import Finish
from edgecompose.generation.messages import Overflow, RouteBy
from edgecompose.retrieval.index import Neighbour

#: What `edgecompose` exports, in the order of the page.
_NAMES = (
    "open_bundle",
    "Composer",
    "Request",
    "RetrievalSettings",
    "MergeSettings",
    "Sampling",
    "Answer",
    "Retrieval",
    "Composition",
    "Generation",
    "Chat",
    "Message",
    "AsyncComposer",
    "AsyncGeneration",
    "EdgeComposeError",
)
#: Classes that only methods construct; the page leaves their constructors out.
_CONSTRUCTED_BY_METHODS = ("AsyncGeneration", "Generation")
#: Classes whose objects are fields of the public ones.
_FIELD_CLASSES = (("Device", Device), ("MergeReport", MergeReport), ("Neighbour", Neighbour))
_WIDTH = 100


def python_page() -> str:
    """What `import edgecompose` offers."""
    if sorted(_NAMES) != sorted(edgecompose.__all__):
        raise SystemExit(f"edgecompose exports {edgecompose.__all__}; list the same names in {__file__}")
    lines = [
        "# Python API",
        "",
        NOTE,
        "",
        "What `edgecompose` exports; other names may change.",
        "[embed-in-a-desktop-tool.md](../guides/embed-in-a-desktop-tool.md) shows how they are used.",
        "",
        ", ".join(f"[`{name}`](#{anchor(name)})" for name in _NAMES),
    ]
    for name in _NAMES:
        value = getattr(edgecompose, name)
        text = _prose(errors.__doc__ or "", tree=True) if _is_error(value) else _described(name, value)
        lines += ["", f"## {name}", "", *text]
    lines += ["", "## Values that these hold", "", *_aliases()]
    for name, kind in _FIELD_CLASSES:
        lines += ["", f"### {name}", "", *_prose(inspect.getdoc(kind) or ""), "", *_field_table(kind)]
    return "\n".join(lines)


def _is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _aliases() -> list[str]:
    """The table of type aliases and their values."""
    literals = (
        ("RouteBy", RouteBy),
        ("Overflow", Overflow),
        ("Attachment", request.Attachment),
        ("Finish", Finish),
    )
    values = {
        "Prompt": 'text, or a list of `Message` or of `{"role", "content"}` that ends with the user\'s',
        **{name: " or ".join(f"`{value!r}`" for value in get_args(kind)) for name, kind in literals},
    }
    return ["| name | values |", "|---|---|", *(f"| `{name}` | {escaped(text)} |" for name, text in values.items())]


def _described(name: str, value: Any) -> list[str]:
    """A function by its signature; a class by its fields or constructor, then by its members."""
    text = _prose(inspect.getdoc(value) or "")
    if not inspect.isclass(value):
        return [*_signature(name, value), "", *text]
    if dataclasses.is_dataclass(value):
        text += ["", *_field_table(value)]
    elif name not in _CONSTRUCTED_BY_METHODS:
        text = [*_signature(name, value), "", *text]
    for member, kind in vars(value).items():
        is_member = isinstance(kind, (property, staticmethod, classmethod)) or callable(kind)
        if is_member and not member.startswith("_"):
            text += ["", *_member(f"{name}.{member}", kind, getattr(value, member))]
    return text


def _member(name: str, kind: object, value: Any) -> list[str]:
    if isinstance(kind, property):
        first, *rest = _prose(inspect.getdoc(kind) or "")
        return [f"**`{name}`**: {first}", *rest]
    signature = _signature(name.rpartition(".")[2], cast(Callable[..., Any], value))
    return [f"**`{name}`**", "", *signature, "", *_prose(inspect.getdoc(value) or "")]


def _field_table(kind: Any) -> list[str]:
    """The fields of a dataclass."""
    rows = (f"| `{f.name}` | {code(str(f.type))} | {_field_default(f)} |" for f in dataclasses.fields(kind))
    return ["| field | type | default |", "|---|---|---|", *rows]


def _field_default(field: dataclasses.Field[Any]) -> str:
    return "" if field.default is dataclasses.MISSING else code(repr(field.default))


class _Text(str):
    """Text that a signature prints without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _signature(name: str, function: Callable[..., Any]) -> list[str]:
    """A signature as a block of text, on one line if it fits."""
    signature = inspect.signature(function)
    parameters = [_printable(p) for p in signature.parameters.values() if p.name != "self"]
    words = "async def " if inspect.iscoroutinefunction(function) else "class " if inspect.isclass(function) else ""
    result = signature.return_annotation
    ending = "" if inspect.isclass(function) or result is inspect.Signature.empty else f" -> {result}"
    line = f"{words}{name}{inspect.Signature(parameters)}{ending}"
    if len(line) <= _WIDTH:
        return ["```text", line, "```"]
    parts = [f"    {part}," for part in _parts(parameters)]
    return ["```text", f"{words}{name}(", *parts, f"){ending}", "```"]


def _printable(parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter whose annotation prints as it is written, and whose default prints as `...` if it is a function."""
    if callable(parameter.default) and parameter.default is not inspect.Parameter.empty:
        parameter = parameter.replace(default=_Text("..."))
    if parameter.annotation is not inspect.Parameter.empty:
        parameter = parameter.replace(annotation=_Text(parameter.annotation))
    return parameter


def _parts(parameters: Sequence[inspect.Parameter]) -> list[str]:
    """Parameters one by one, with the star that starts the keywords."""
    parts: list[str] = []
    starred = False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            parts, starred = [*parts, "*"], True
        parts.append(str(parameter))
    return parts


def _prose(text: str, *, tree: bool = False) -> list[str]:
    """A docstring as Markdown: sections become lists; with `tree`, indented text becomes a block."""
    lines: list[str] = []
    for part in inspect.cleandoc(text).split("\n\n"):
        rows = part.splitlines()
        if rows[0] in ("Args:", "Raises:", "Returns:"):
            items = re.sub(r"\n\s{5,}", " ", "\n".join(rows[1:])).splitlines()
            lines += [f"{rows[0][:-1]}:", "", *(f"- {_item(item.strip())}" for item in items), ""]
        elif tree and rows[0].startswith("    "):
            lines += ["```text", *(row[4:] for row in rows), "```", ""]
        else:
            lines += [*(escaped(row) for row in rows), ""]
    return lines[:-1]


def _item(text: str) -> str:
    """An item of a section; the name in front of its colon is code."""
    name, separator, rest = text.partition(": ")
    return f"`{name}`: {escaped(rest)}" if separator and re.fullmatch(r"\w+", name) else escaped(text)
