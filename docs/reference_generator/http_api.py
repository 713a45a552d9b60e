"""The page of the HTTP API: routes, fields of calls, responses and errors."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import edgecompose
from docs.reference_generator.markdown import NOTE, json_lines, json_text
from edgecompose.engine.device import Device
from edgecompose.generation.messages import Overflow, RouteBy
from edgecompose.retrieval.index import Neighbour
from edgecompose.server import protocol, responses
from edgecompose.server.config import CallLimits, ServerSettings
from edgecompose.server.endpoints import BY_PATH
from edgecompose.server.http.app import create_app
from edgecompose.server.unsupported import FIELDS
from edgecompose.settings import MergeSettings, RetrievalSettings, Sampling, settings_of
from edgecompose.timing import STAGES

_PACKAGE = Path(edgecompose.__file__).parent
#: What the fields of a call mean, beside those of settings. The generator fails if the code has other fields.
_CALL = {
    "model": "`auto` retrieves, `base` takes no adapter, `task:NAME` those that a task is mapped to",
    "max_tokens": "longest answer; by default the bundle's, else as long as the context and the server's "
    "`--max-tokens` allow, as with -1; a larger number is taken for that",
    "max_completion_tokens": "the same; it takes precedence",
    "stream": "chunks as server-sent events",
    "stream_options": '`{"include_usage": true}` ends a stream with the number of tokens',
    "adapters": "name -> weight: composes by hand, with the model `auto`",
    "edgecompose": "see the next table",
}
_OWN = {
    "exclude": "tasks that retrieval leaves out",
    "raw": "true sends the prompt as it is, false in the chat template; by default as the adapters were trained, in "
    "completions true",
    "route_by": "the message that adapters are chosen by",
    "overflow": "what to do with a conversation that is too long: refuse it, or leave its oldest turns out",
    "choices": "answers to score instead of generating one",
    "prompt_cache": "reuse what an earlier answer under the same blend has read; by default true for chats",
    "special_tokens": "read special tokens that are written in the prompt as such; by default only at /v1/completions, "
    "else they are text",
    "drafts": "tokens of the answer that are guessed for one pass at most, 0 to 8; the answer is the same",
    "explain": "false leaves `edgecompose` out of the response, but for scores of choices",
}
_STATUS = {
    400: "the call is malformed, names a field that is not supported, or asks for what the bundle cannot do",
    401: "the key is missing or wrong",
    403: "a page of another site sent it",
    404: "no such path or model",
    405: "no such method at this path; `Allow` names those it has",
    408: "the body was not complete in time",
    413: "the body is larger than the server reads",
    415: "the body is not said to be JSON (`Content-Type: application/json`)",
    421: "the server is not called by that name (`--allow-host`)",
    429: "as many requests wait as may; come again after `Retry-After` seconds",
    500: "a file of the bundle is damaged, the device failed, or the server has an error of its own",
    503: "the server is ending, has too many connections, or needs a restart because its bundle was changed",
}

#: Words of Python's types and the words of the page.
_TYPE_WORDS = (
    ("str", "text"),
    ("dict[text, float]", "object"),
    ("int", "integer"),
    ("float", "number"),
    ("bool", "true or false"),
    ("_StreamOptions", "object"),
    ("dict[text, Any]", "object"),
    ("MajoritySign", "`total` or `frequency`"),
)
_FIELD_HEAD = ("| field | type | default | |", "|---|---|---|---|")


def http_page() -> str:
    """Routes of the server, fields of calls, and what responses hold."""
    lines = [
        "# HTTP API",
        "",
        NOTE,
        "",
        "`edgecompose serve`, see [serve.md](../guides/serve.md). Bodies are JSON; what `serve --stdio` takes as",
        "`params` and gives as `result`, and the `body` of a line of `edgecompose batch`, are the same.",
        "",
        "## Routes",
        "",
        "| method | path | |",
        "|---|---|---|",
        *_routes(),
        "",
        *_calls(),
        "",
        *_embeddings(),
        "",
        *_responses(),
        "",
        *_errors(),
    ]
    return "\n".join(lines)


def _routes() -> Iterator[str]:
    service = create_app(cast(Any, None), ServerSettings())
    for route in cast(Any, service.routes):
        method = next(name for name in ("POST", "GET") if name in route.methods)
        row = BY_PATH.get(route.path)
        text = row.help if row else (inspect.getdoc(route.endpoint) or "").partition(": ")[2].rstrip(".")
        yield f"| {method} | `{route.path.replace(':path', '')}` | {text} |"


def _calls() -> Iterator[str]:
    """The fields of calls that answer or compose."""
    yield from ("## Calls to /v1/chat/completions, /v1/completions and /v1/compose", "", *_FIELD_HEAD)
    yield (
        '| `messages` | list of `{"role", "content"}` | required by chat and compose | '
        "roles `system` (or `developer`), `user`, `assistant`; content is text, or a list of text parts; the last one "
        "is not the assistant's; system messages at the beginning are joined, later ones go to the chat template |"
    )
    yield "| `prompt` | text or list of texts | required by completions | sent as it is |"
    yield f"| `stop` | text or list of texts | none | what an answer ends before, {CallLimits().stops} at most |"
    yield from _fields(protocol._Fields, _CALL, _call_default)
    yield from _fields(Sampling, _help(Sampling), lambda field: "")
    yield from ("", "Without temperature, top_p, top_k and min_p, decoding is greedy. With one of them, the others are")
    yield from ("those of OpenAI's API: temperature 1, top_p 1. A top_k of -1 is none; a top_p of 0 is greedy.", "")
    yield from ("`edgecompose` in a call:", "", *_FIELD_HEAD)
    yield from _fields(protocol._Own, _OWN, _own_default)
    for kind in (RetrievalSettings, MergeSettings):
        yield from _fields(kind, _help(kind), lambda field: "the bundle's")
    neutral = (f"`{name}` ({' or '.join(map(json_text, row.neutral)) or 'left out'})" for name, row in FIELDS.items())
    yield from ("", f"Refused unless they have the value that changes nothing: {', '.join(neutral)}.")
    yield from ("", "With `tool_choice` none, `tools` are accepted and not called.")
    yield from ("", "Other fields are ignored.")


def _embeddings() -> list[str]:
    return [
        "## Calls to /v1/embeddings",
        "",
        *_FIELD_HEAD,
        "| `input` | text or list of texts | required | |",
        "| `encoding_format` | `float` or `base64` | `float` | base64 is of little-endian float32 |",
        "",
        "`dimensions` and `truncate_prompt_tokens` are refused, other fields are ignored.",
    ]


def _responses() -> list[str]:
    return [
        "## Responses",
        "",
        "To a chat call, a made-up answer that shows the form:",
        "",
        "```json",
        *json_lines(_sample()),
        "```",
        "",
        "`edgecompose` is what `edgecompose run --json` prints, without prompt, answer and finish; a list of them",
        "where there are several prompts. A completion has `text` instead of `message`. A stream is a line",
        "`data: {...}` for each chunk: the first with the role, and the weights in `edgecompose`; the last with",
        "`finish_reason` and the whole of `edgecompose`; `data: [DONE]` ends it. A line `: waiting` is a comment",
        'while an answer is still to come. An error after the beginning is an event `{"error": ...}` before the end.',
        '`"bundle_changed": true` in `edgecompose` says that the bundle on disk is another one than answered.',
    ]


def _errors() -> list[str]:
    return [
        "## Errors",
        "",
        '`{"error": {"message", "type", "param", "code"}}` with the status:',
        "",
        "| status | |",
        "|---|---|",
        *(f"| {status} | {text} |" for status, text in _statuses().items()),
    ]


def _help(kind: type) -> dict[str, str]:
    """What each setting of a class means."""
    return {name: item.help[:1].lower() + item.help[1:].rstrip(".") for name, item in settings_of(kind).items()}


def _own_default(field: dataclasses.Field[Any]) -> str:
    """The default of a field of `edgecompose`: that of a request."""
    if field.default is True:
        return "`true`"
    default = {item.name: item.default for item in dataclasses.fields(edgecompose.Request)}[field.name]
    return f"`{json_text(default)}`" if isinstance(default, str) else ""


def _call_default(field: dataclasses.Field[Any]) -> str:
    return f"`{json_text(field.default)}`" if isinstance(field.default, (str, int, float)) else ""


def _fields(kind: type, meanings: Mapping[str, str], default: Callable[[dataclasses.Field[Any]], str]) -> Iterator[str]:
    """A row for each field of a class.

    Raises:
        SystemExit: `meanings` describes other fields.
    """
    fields = dataclasses.fields(cast(Any, kind))
    names = [field.name for field in fields]
    if names != list(meanings):
        raise SystemExit(f"{kind.__name__} has the fields {names}; describe the same fields in {__file__}")
    for field in fields:
        yield f"| `{field.name}` | {_type_words(str(field.type))} | {default(field)} | {meanings[field.name]} |"


def _type_words(annotation: str) -> str:
    """A Python type in the words of the page."""
    words = re.sub(r"tuple\[str, \.\.\.\]", "list of texts", annotation.replace(" | None", ""))
    for python_word, word in _TYPE_WORDS:
        words = re.sub(rf"(?<![\w]){re.escape(python_word)}(?!\w)", word, words)
    for alias, values in (("RouteBy", RouteBy), ("Overflow", Overflow)):
        words = words.replace(alias, " or ".join(f"`{value}`" for value in get_args(values)))
    if words.startswith("Literal["):
        quoted = re.findall(r"'(\w+)'|\"(\w+)\"", words)
        words = " or ".join(f"`{value}`" for pair in quoted for value in pair if value)
    return words


def _sample() -> dict[str, Any]:
    """A response with made-up values."""
    choice = edgecompose.Retrieval(
        neighbours=(Neighbour("yelp", 3212, 0.848),),
        distribution={"yelp": 0.97, "imdb": 0.03},
        nucleus={"yelp": 1.0},
        weights={"yelp": 1.0},
    )
    answer = edgecompose.Answer(
        prompt="",
        text="negative",
        retrieval=choice,
        settings=edgecompose.MergeSettings(),
        composition="0703f594ce76...",
        device=Device("cpu", ("CPUExecutionProvider",), "cpu was requested"),
        timings_ms=dict.fromkeys(STAGES, 0.0),
        prompt_tokens=64,
        generated_tokens=1,
    )
    call = protocol.ApiCall(kind="chat", model="auto", prompts=("",), request=edgecompose.Request())
    return {**responses.response(call, [answer], "chatcmpl-..."), "created": 0}


def _statuses() -> dict[int, str]:
    """The description of every status.

    Raises:
        SystemExit: the code answers with a status that has no description.
    """
    source = "".join(path.read_text("utf-8") for path in sorted((_PACKAGE / "server").rglob("*.py")))
    statuses = {int(number) for number in re.findall(r"(?:status=|status = |status_code=)(\d{3})", source)}
    unknown = statuses - set(_STATUS) - {200, 204, 499}  # 499: the client closed the connection
    if unknown:
        raise SystemExit(f"the statuses {sorted(unknown)} have no description in {__file__}")
    return _STATUS
