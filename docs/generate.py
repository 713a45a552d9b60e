"""Writes docs/reference/ from the code: `python docs/generate.py`. tests/test_docs.py fails while the two differ."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_args

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found as a script, however edgecompose is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))

import edgecompose
from edgecompose import errors, request
from edgecompose.bundle.manifest import Defaults
from edgecompose.cli.main import main as runtime
from edgecompose.engine.device import Device
from edgecompose.engine.merged import MergeReport
from edgecompose.generation import messages
from edgecompose.generation.decode import Finish
from edgecompose.retrieval import index
from edgecompose.server import protocol
from edgecompose.server.app import create_app
from edgecompose.server.config import ServerSettings
from edgecompose.timing import STAGES
from edgecompose_export.cli import main as export

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
#: What `edgecompose` exports, in the order of the page.
_NAMES = (
    "open_bundle", "Composer", "Request", "Sampling", "MergeSettings", "Answer", "Retrieval", "Composition",
    "Generation", "Chat", "Message", "AsyncComposer", "AsyncGeneration", "EdgeComposeError",
)  # fmt: skip
#: Classes whose objects methods return; nobody calls their constructors.
_MADE_BY_OTHERS = ("AsyncGeneration", "Generation")
NOTE = "Written by `python docs/generate.py` from the code; do not edit."
_WIDTH = 100
#: What the fields of a call mean. The generator fails where these and the code name other fields.
_CALL = {
    "model": "`auto` retrieves, `base` takes no adapter, `task:NAME` those that serve a task",
    "max_tokens": "longest answer; by default the bundle's, at most the server's `--max-tokens`",
    "max_completion_tokens": "the same, and goes before it",
    "temperature": "divides the logits; without it, `top_p`, `top_k` and `min_p`, the likeliest token is taken, always",
    "top_p": "the fewest tokens whose probabilities reach it",
    "top_k": "the k likeliest tokens; 0 all",
    "min_p": "tokens at least that times as likely as the likeliest",
    "repetition_penalty": "above 1, what was said before is less likely",
    "seed": "makes draws reproducible",
    "stream": "pieces as server-sent events",
    "stream_options": "`{\"include_usage\": true}` ends a stream with the number of tokens",
    "adapters": "name -> weight: composes by hand, with the model `auto`",
    "edgecompose": "see the next table",
}  # fmt: skip
_OWN = {
    "exclude": "tasks that are left out of retrieval",
    "neighbours": "examples that are retrieved (N)",
    "temperature": "T of exp(-(1-cos)/T)",
    "nucleus": "nucleus over tasks (p)",
    "size_correction": "power of a task's number of examples that its votes are divided by",
    "shortcut": "share of the likeliest task at which it is taken alone",
    "fallback": "share of the likeliest task below which the base answers alone",
    "raw": "true sends the prompt as it is, false in the chat template; by default as the adapters were trained, in "
    "completions true",
    "query": "the message that adapters are chosen by",
    "overflow": "what is done with a conversation that is too long: an error, or its oldest turns are left out",
    "choices": "answers that are scored instead of generating",
    "reuse": "go on with what an earlier answer under the same blend has read; by default true for chats",
    "method": "merge method",
    "density": "share of entries that prunes and drops keep",
    "majority_sign": "how ties elects a sign",
    "rank": "largest rank that svd leaves",
    "energy": "share of the squared norm that svd keeps",
    "seed": "which entries the dare methods keep",
    "norm_guard": "rescale the blend to the mean norm of its parts",
}
_STATUS = {
    400: "the call is malformed, names a field that is not supported, or asks for what the bundle cannot do",
    401: "the key is missing or wrong",
    403: "a page of another site sent it",
    404: "no such path or model",
    405: "no such method at this path",
    413: "the body is larger than the server reads",
    415: "the body is not said to be JSON (`Content-Type: application/json`)",
    421: "the server is not called by that name (`--allow-host`)",
    429: "as many requests wait as may; come again after `Retry-After` seconds",
    500: "a file of the bundle is damaged, or the device failed",
}


def pages() -> dict[Path, str]:
    """Every page of the reference and what it says."""
    written = {"cli.md": cli_page(), "python.md": python_page(), "http.md": http_page()}
    return {FOLDER / name: f"{text.rstrip()}\n" for name, text in written.items()}


# The commands


def cli_page() -> str:
    """Every command of both programs."""
    lines = [
        "# Commands", "", NOTE, "",
        "Results go to standard output, everything else to standard error. Exit code 0 is success, 1 an error that",
        "says what to do, 2 a usage error. Options without a default take the bundle's, or nothing.",
    ]  # fmt: skip
    found = [(program, *one) for program, group in _PROGRAMS.items() for one in _commands(group, (program,))]
    for program in _PROGRAMS:
        names = (" ".join(path) for name, path, _ in found if name == program)
        lines += [
            "",
            f"`{program}`: " + ", ".join(f"[{name.removeprefix(f'{program} ')}](#{anchor(name)})" for name in names),
        ]
    for _, path, command in found:
        lines += ["", f"## {' '.join(path)}", "", *_command(path, command)]
    return "\n".join(lines)


_PROGRAMS: Mapping[str, click.Group] = MappingProxyType({"edgecompose": runtime, "edgecompose-export": export})


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
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
        lines += [*(["```sh", *part.splitlines()[1:], "```"] if part.startswith("\b") else [_escaped(part)]), ""]
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    lines += ["| option | default | |", "|---|---|---|", *(_option(option, context) for option in options)]
    return lines


def _option(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    values = "" if option.is_flag else f" {_values(option, context)}"
    default = option.get_default(context)
    shown = "required" if option.required else "" if _says_nothing(default) else _default(option, default)
    return f"| {names}{values} | {shown} | {_escaped(option.help or '')} |"


def _says_nothing(default: object) -> bool:
    """Whether a default is none: unset, or a flag that is not given."""
    return default is None or default is False or default == () or "UNSET" in repr(default)


def _default(option: click.Option, default: object) -> str:
    if option.is_flag and option.secondary_opts:
        return f"`{option.opts[0] if default else option.secondary_opts[0]}`"
    return f"`{default}`"


def _values(option: click.Option, context: click.Context) -> str:
    kind = option.type
    if isinstance(kind, click.Choice):
        return " or ".join(f"`{choice}`" for choice in kind.choices)
    if option.metavar:
        return _escaped(f"`{option.metavar}`")
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        noun = "integer" if isinstance(kind, click.IntRange) else "number"
        low = "" if kind.min is None else f"above {kind.min:g}" if kind.min_open else f"from {kind.min:g}"
        high = "" if kind.max is None else f"to {kind.max:g}"
        return " ".join(word for word in (noun, low, high) if word)
    return f"`{'PATH' if isinstance(kind, click.Path) else kind.name.upper()}`"


# Python


def python_page() -> str:
    """What `import edgecompose` offers."""
    if sorted(_NAMES) != sorted(edgecompose.__all__):
        raise SystemExit(f"edgecompose exports {edgecompose.__all__}; put these in order in docs/generate.py")
    held = [("Device", Device), ("MergeReport", MergeReport), ("Neighbour", index.Neighbour)]
    lines = [
        "# Python API", "", NOTE, "", "What `edgecompose` exports; other names may change.",
        "[embed-in-a-desktop-tool.md](../guides/embed-in-a-desktop-tool.md) shows how they are used.", "",
        ", ".join(f"[`{name}`](#{anchor(name)})" for name in _NAMES),
    ]  # fmt: skip
    for name in _NAMES:
        found = getattr(edgecompose, name)
        shown = _prose(errors.__doc__ or "", tree=True) if _is_error(found) else _described(name, found)
        lines += ["", f"## {name}", "", *shown]
    lines += ["", "## Values that these hold", "", *_aliases()]
    for name, found in held:
        lines += ["", f"### {name}", "", *_prose(inspect.getdoc(found) or ""), "", *_table(found)]
    return "\n".join(lines)


def _is_error(found: object) -> bool:
    return inspect.isclass(found) and issubclass(found, Exception)


def _aliases() -> list[str]:
    shown = {
        "Prompt": "text, or a list of `Message` or of `{\"role\", \"content\"}` that ends with the user's",
        **{
            name: " or ".join(f"`{value!r}`" for value in get_args(kind))
            for name, kind in (
                ("Query", messages.Query), ("Overflow", messages.Overflow), ("Attachment", request.Attachment),
                ("Finish", Finish),
            )
        },
    }  # fmt: skip
    return ["| name | values |", "|---|---|", *(f"| `{name}` | {_escaped(text)} |" for name, text in shown.items())]


def _described(name: str, found: Any) -> list[str]:
    if not inspect.isclass(found):
        return [*_signature(name, found), "", *_prose(inspect.getdoc(found) or "")]
    shown = _prose(inspect.getdoc(found) or "")
    if dataclasses.is_dataclass(found):
        shown += ["", *_table(found)]
    elif name not in _MADE_BY_OTHERS:
        shown = [*_signature(name, found), "", *shown]
    for member, kind in vars(found).items():
        if member.startswith("_") or not isinstance(kind, (property, staticmethod, classmethod)) and not callable(kind):
            continue
        if isinstance(kind, property):
            shown += ["", f"**`{name}.{member}`**: {_prose(inspect.getdoc(kind) or '')[0]}"]
            shown += _prose(inspect.getdoc(kind) or "")[1:]
        else:
            work = cast(Callable[..., Any], getattr(found, member))
            shown += [
                "",
                f"**`{name}.{member}`**",
                "",
                *_signature(member, work),
                "",
                *_prose(inspect.getdoc(work) or ""),
            ]
    return shown


def _table(found: Any) -> list[str]:
    """The fields of a dataclass."""
    rows = (f"| `{f.name}` | {_code(str(f.type))} | {_field_default(f)} |" for f in dataclasses.fields(found))
    return ["| field | type | default |", "|---|---|---|", *rows]


class _Text(str):
    """Text that a signature prints as it is."""

    def __repr__(self) -> str:
        return str(self)


def _signature(name: str, found: Callable[..., Any]) -> list[str]:
    signature = inspect.signature(found)
    shown = []
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if callable(parameter.default) and parameter.default is not inspect.Parameter.empty:
            parameter = parameter.replace(default=_Text("..."))
        if parameter.annotation is not inspect.Parameter.empty:
            parameter = parameter.replace(annotation=_Text(parameter.annotation))
        shown.append(parameter)
    words = "async def " if inspect.iscoroutinefunction(found) else "class " if inspect.isclass(found) else ""
    back = signature.return_annotation
    ending = "" if inspect.isclass(found) or back is inspect.Signature.empty else f" -> {back}"
    line = f"{words}{name}{inspect.Signature(shown)}{ending}"
    if len(line) <= _WIDTH:
        return ["```text", line, "```"]
    parts = [f"    {part}," for part in _parts(shown)]
    return ["```text", f"{words}{name}(", *parts, f"){ending}", "```"]


def _parts(parameters: Sequence[inspect.Parameter]) -> list[str]:
    parts: list[str] = []
    starred = False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            parts, starred = [*parts, "*"], True
        parts.append(str(parameter))
    return parts


def _prose(text: str, *, tree: bool = False) -> list[str]:
    """A docstring as Markdown: sections as lists, a drawing (indented at once) as a block."""
    lines: list[str] = []
    for part in inspect.cleandoc(text).split("\n\n"):
        rows = part.splitlines()
        if rows[0] in ("Args:", "Raises:", "Returns:"):
            items = re.sub(r"\n\s{5,}", " ", "\n".join(rows[1:])).splitlines()
            lines += [f"{rows[0][:-1]}:", "", *(f"- {_named(item.strip())}" for item in items), ""]
        elif tree and rows[0].startswith("    "):
            lines += ["```text", *(row[4:] for row in rows), "```", ""]
        else:
            lines += [*(_escaped(row) for row in rows), ""]
    return lines[:-1]


def _named(item: str) -> str:
    name, separator, rest = item.partition(": ")
    return f"`{name}`: {_escaped(rest)}" if separator and re.fullmatch(r"\w+", name) else _escaped(item)


def _field_default(field: dataclasses.Field[Any]) -> str:
    return "" if field.default is dataclasses.MISSING else _code(repr(field.default))


# HTTP


def http_page() -> str:
    """Routes of the server, fields of calls, and what responses hold."""
    lines = [
        "# HTTP API", "", NOTE, "",
        "`edgecompose serve`, see [serve.md](../guides/serve.md). Bodies are JSON; what `serve --stdio` takes as",
        "`params` and gives as `result`, and the `body` of a line of `edgecompose batch`, are the same.", "",
        "## Routes", "",
        "| method | path | |", "|---|---|---|", *_routes(), "",
        "## Calls to /v1/chat/completions, /v1/completions and /v1/compose", "",
        "| field | type | default | |", "|---|---|---|---|",
        "| `messages` | list of `{\"role\", \"content\"}` | required by chat and compose | "
        "roles `system` (or `developer`), `user`, `assistant`; content is text, or a list of text parts |",
        "| `prompt` | text or list of texts | required by completions | sent as it is |",
        f"| `stop` | text or list of texts | none | what an answer ends before, {protocol._STOPS} at most |",
        *_fields(protocol._Call, _CALL), "",
        "`edgecompose` in a call:", "", "| field | type | default | |", "|---|---|---|---|",
        *_fields(protocol._Own, _OWN, default=_own_default), "",
        "Refused unless they have the value that changes nothing: "
        + ", ".join(f"`{name}` ({' or '.join(map(_json, v)) or 'left out'})" for name, v in protocol._NEUTRAL.items())
        + ".", "", "Other fields are ignored.", "",
        "## Calls to /v1/embeddings", "", "| field | type | default | |", "|---|---|---|---|",
        "| `input` | text or list of texts | required | |",
        "| `encoding_format` | `float` or `base64` | `float` | base64 is of little-endian float32 |", "",
        "`dimensions` is refused, other fields are ignored.", "",
        "## Responses", "", "To a chat call, a made-up answer that shows the form:", "", "```json",
        *_laid_out(_sample()), "```", "",
        "`edgecompose` is what `edgecompose run --json` prints, without prompt, answer and finish; a list of them",
        "where there are several prompts. A completion has `text` instead of `message`. A stream is a line",
        "`data: {...}` for each piece, the last with `finish_reason` and `edgecompose`; `data: [DONE]` ends it.", "",
        "## Errors", "", "`{\"error\": {\"message\", \"type\", \"param\", \"code\"}}` with the status:", "",
        "| status | |", "|---|---|", *(f"| {status} | {text} |" for status, text in _statuses().items()),
    ]  # fmt: skip
    return "\n".join(lines)


def _routes() -> Iterator[str]:
    service = create_app(cast(Any, None), ServerSettings())
    for route in cast(Any, service.routes):
        method = next(name for name in ("POST", "GET") if name in route.methods)
        text = (inspect.getdoc(route.endpoint) or "").partition(": ")[2].rstrip(".")
        yield f"| {method} | `{route.path.replace(':path', '')}` | {text} |"


def _own_default(field: dataclasses.Field[Any]) -> str:
    """What holds where `edgecompose` says nothing: the bundle's setting, or that of a request."""
    if field.name in {item.name for item in dataclasses.fields(Defaults)}:
        return "the bundle's"
    known = {item.name: item.default for item in dataclasses.fields(edgecompose.Request)}[field.name]
    return f"`{_json(known)}`" if isinstance(known, str) else ""


def _call_default(field: dataclasses.Field[Any]) -> str:
    return f"`{_json(field.default)}`" if isinstance(field.default, (str, int, float)) else ""


def _fields(
    kind: type, meaning: Mapping[str, str], default: Callable[[dataclasses.Field[Any]], str] = _call_default
) -> Iterator[str]:
    found = dataclasses.fields(cast(Any, kind))
    if [field.name for field in found] != list(meaning):
        raise SystemExit(f"fields of {kind.__name__} are {[f.name for f in found]}; describe these in docs/generate.py")
    for field in found:
        kinds = re.sub(r"tuple\[str, \.\.\.\]", "list of texts", str(field.type).replace(" | None", ""))
        for ours, theirs in (
            ("str", "text"), ("dict[text, float]", "object"), ("int", "integer"), ("float", "number"),
            ("bool", "true or false"), ("_StreamOptions", "object"), ("_Own", "object"),
        ):  # fmt: skip
            kinds = re.sub(rf"(?<![\w]){re.escape(ours)}(?!\w)", theirs, kinds)
        for alias, values in (("Query", messages.Query), ("Overflow", messages.Overflow)):
            kinds = kinds.replace(alias, " or ".join(f"`{value}`" for value in get_args(values)))
        if kinds.startswith("Literal["):
            kinds = " or ".join(
                f"`{value}`" for value in re.findall(r"'(\w+)'|\"(\w+)\"", kinds) for value in value if value
            )
        yield f"| `{field.name}` | {kinds} | {default(field)} | {meaning[field.name]} |"


def _sample() -> dict[str, Any]:
    found = edgecompose.Retrieval(
        (index.Neighbour("yelp", 3212, 0.848),), {"yelp": 0.97, "imdb": 0.03}, {"yelp": 1.0}, {"yelp": 1.0}
    )
    answer = edgecompose.Answer(
        "", "negative", found, edgecompose.MergeSettings(), "0703f594ce76...",
        Device("cpu", ("CPUExecutionProvider",), "cpu was asked for"), dict.fromkeys(STAGES, 0.0), 64, 1,
    )  # fmt: skip
    asked = protocol.Asked("chat", "auto", ("",), edgecompose.Request())
    return {**protocol.response(asked, [answer], "chatcmpl-..."), "created": 0}


def _statuses() -> dict[int, str]:
    """Every status, checked against those that the code gives."""
    code = "".join((ROOT / "edgecompose" / name).read_text("utf-8") for name in ("server/app.py", "server/protocol.py"))
    given = {int(number) for number in re.findall(r"(?:status=|status = |status_code=)(\d{3})", code)}
    unknown = given - set(_STATUS) - {499}  # of a caller that is gone
    if unknown:
        raise SystemExit(f"statuses {sorted(unknown)} are not described in docs/generate.py")
    return _STATUS


# Markdown


def anchor(heading: str) -> str:
    """What a heading is linked by, as GitHub names it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _laid_out(value: Mapping[str, Any]) -> list[str]:
    """A JSON object, one field a line, and one a line of its last."""
    *fields, (last, inner) = value.items()
    lines = [f"    {_json(name)}: {_json(found)}," for name, found in inner.items()]
    lines[-1] = lines[-1][:-1]
    return [
        "{",
        *(f"  {_json(name)}: {_json(found)}," for name, found in fields),
        f"  {_json(last)}: {{",
        *lines,
        "  }",
        "}",
    ]


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _escaped(text: str) -> str:
    """Text that a table's cell or a paragraph shows as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
