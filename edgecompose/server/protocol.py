"""Requests and responses in the form of the OpenAI API, as frozen values and JSON; knows nothing of HTTP.

What would change an answer and is not supported is refused by name; what would not (`user`, `metadata`) is ignored.
Beyond that API: `adapters` (name -> weight) composes by hand, `top_k`, `min_p` and `repetition_penalty` are those of
`sampling.Sampling`, `edgecompose` holds fields of `request.Request`; and every response tells in `edgecompose` how its
answer came about. `temperature` and `top_p` left out mean the likeliest token, always.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from edgecompose.bundle.records import value_from_json
from edgecompose.composer import Composer
from edgecompose.errors import ApiError, EdgeComposeError, ManifestInvalid, PromptTooLong
from edgecompose.generation.messages import Message, Overflow, Prompt, Query, conversation
from edgecompose.generation.sampler import Sampling
from edgecompose.merging.methods import MergeSettings
from edgecompose.request import Answer, Request, given
from edgecompose.serialize import answer_json

Json = dict[str, Any]
Kind = Literal["chat", "text"]
T = TypeVar("T")

#: Fields that a caller may leave at the value that changes nothing, and no other.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (),
}  # fmt: skip
_STOPS = 16


@dataclass(frozen=True, slots=True)
class _StreamOptions:
    include_usage: bool = False
    include_obfuscation: bool = False


@dataclass(frozen=True, slots=True)
class _Own:
    """What `edgecompose` in a call may say: fields of `Request`, and of `MergeSettings`."""

    exclude: tuple[str, ...] | None = None
    neighbours: int | None = None
    temperature: float | None = None
    nucleus: float | None = None
    size_correction: float | None = None
    shortcut: float | None = None
    fallback: float | None = None
    raw: bool | None = None
    query: Query | None = None
    overflow: Overflow | None = None
    choices: tuple[str, ...] | None = None
    reuse: bool | None = None
    method: str | None = None
    density: float | None = None
    majority_sign: Literal["total", "frequency"] | None = None
    rank: int | None = None
    energy: float | None = None
    seed: int | None = None
    norm_guard: bool | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    """The fields of a call that change its answer, `messages`, `prompt` and `stop` apart, which have several forms."""

    model: str = "auto"
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    adapters: dict[str, float] | None = None
    edgecompose: _Own = _Own()


@dataclass(frozen=True, slots=True)
class Asked:
    """What one call asks for: prompts, each to be answered as `request` says; `model` as it was given.

    `usage` is whether a stream ends with the number of tokens.
    """

    kind: Kind
    model: str
    prompts: tuple[Prompt, ...]
    request: Request
    stream: bool = False
    usage: bool = False


def parse_call(kind: Kind, body: object, *, merge: MergeSettings, max_tokens: int, default_tokens: int) -> Asked:
    """A call to /v1/chat/completions ('chat') or /v1/completions ('text').

    Args:
        body: the parsed JSON.
        merge: the bundle's settings, which `edgecompose.method` and others change.
        max_tokens: the longest answer that may be asked for.
        default_tokens: the longest answer where none is asked for.

    Raises:
        ApiError: a field is missing, malformed, or not supported.
        EdgeComposeError: a value is out of its range.
    """
    fields = _object(body, "the request")
    for name, neutral in _NEUTRAL.items():
        if fields.get(name) is not None and fields[name] not in neutral:
            raise ApiError(f"'{name}' is {fields[name]!r:.80}, which is not supported; leave it out", param=name)
    prompts: tuple[Prompt, ...] = (_messages(fields),) if kind == "chat" else _texts(fields, "prompt")
    known = {item.name for item in dataclasses.fields(_Call)}
    call = _typed(_Call, {name: value for name, value in fields.items() if name in known}, "request")
    wanted = given(call.max_completion_tokens, given(call.max_tokens, default_tokens))
    if not 1 <= wanted <= max_tokens:
        raise ApiError(f"max_tokens is {wanted}; 1 to {max_tokens} is wanted", param="max_tokens")
    request = Request(weights=call.adapters, max_tokens=wanted, sampling=_sampling(call), stop=_stops(fields))
    own = {name: value for name, value in dataclasses.asdict(call.edgecompose).items() if value is not None}
    merging = {item.name for item in dataclasses.fields(MergeSettings)}
    own |= {"merge": dataclasses.replace(merge, **{name: own.pop(name) for name in merging & set(own)})}
    request = dataclasses.replace(request, **{"reuse": kind == "chat", "raw": None if kind == "chat" else True} | own)
    return Asked(kind, call.model, prompts, request, call.stream, call.stream_options.include_usage)


def model_names(composer: Composer) -> list[str]:
    """What `model` may be: `auto` retrieves, `base` takes no adapter, `task:NAME` those that serve a task."""
    return ["auto", "base", *(f"task:{name}" for name in composer.bundle.manifest.tasks)]


def unknown_model(name: str) -> ApiError:
    """There is no such model."""
    return ApiError(
        f"no model is called '{name:.80}'; use auto, base or task:NAME, as /v1/models lists them",
        param="model", code="model_not_found", status=404,
    )  # fmt: skip


def asked_of(composer: Composer, kind: Kind, body: object, *, max_tokens: int) -> Asked:
    """A call to a composer: parsed, with the weights that its model stands for.

    Args:
        max_tokens: the longest answer that may be asked for.

    Raises:
        ApiError: a field is missing, malformed, or not supported.
        EdgeComposeError: a value is out of its range.
    """
    default = min(composer.bundle.manifest.defaults.max_tokens, max_tokens)
    asked = parse_call(
        kind, body, merge=composer.default_merge, max_tokens=max_tokens, default_tokens=default
    )  # fmt: skip
    if asked.model not in model_names(composer):
        raise unknown_model(asked.model)
    if asked.model == "auto":
        return asked
    if asked.request.weights is not None:
        raise ApiError(f"'adapters' and the model '{asked.model}' exclude each other; use 'auto'", param="adapters")
    task = asked.model.removeprefix("task:")
    weights = {} if asked.model == "base" else composer.adapters_for({task: 1.0})
    return dataclasses.replace(asked, request=dataclasses.replace(asked.request, weights=weights))


def parse_inputs(body: object) -> tuple[tuple[str, ...], bool]:
    """Texts of a call to /v1/embeddings, and whether vectors are wanted in base64.

    Raises:
        ApiError: a field is missing, malformed, or not supported.
    """
    fields = _object(body, "the request")
    if fields.get("dimensions") is not None:
        raise ApiError("'dimensions' is not supported; leave it out", param="dimensions")
    form = fields.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise ApiError(f"encoding_format is {form!r:.80}; float or base64 is wanted", param="encoding_format")
    return _texts(fields, "input"), form == "base64"


def new_id(kind: Kind) -> str:
    """A name for a response."""
    return f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"


def response(asked: Asked, answers: Sequence[Answer], name: str) -> Json:
    """A whole response."""
    return {
        "id": name, "object": "chat.completion" if asked.kind == "chat" else "text_completion",
        "created": int(time.time()), "model": asked.model,
        "choices": [
            {"index": index, **_said(asked.kind, answer.text), "logprobs": None, "finish_reason": answer.finish}
            for index, answer in enumerate(answers)
        ],
        "usage": _usage(answers),
        "edgecompose": [explanation(a) for a in answers] if len(answers) > 1 else explanation(answers[0]),
    }  # fmt: skip


def chunk(asked: Asked, name: str, text: str, *, index: int = 0, first: bool = False) -> Json:
    """A piece of a streamed answer."""
    return _chunk(asked, name, {"index": index, **_piece(asked.kind, text, first), "finish_reason": None})


def last_chunk(asked: Asked, name: str, answer: Answer, *, index: int = 0) -> Json:
    """The end of a streamed answer, with what there is to tell of it."""
    ending = {"index": index, **_piece(asked.kind, "", False, ending=True), "finish_reason": answer.finish}
    return {**_chunk(asked, name, ending), "edgecompose": explanation(answer)}


def usage_chunk(asked: Asked, name: str, answers: Sequence[Answer]) -> Json:
    """The number of tokens, after a stream whose caller asked for it."""
    return {**_chunk(asked, name, None), "usage": _usage(answers)}


def explanation(answer: Answer) -> Json:
    """How an answer came about, without what the response says elsewhere."""
    found = answer_json(answer)
    return {key: value for key, value in found.items() if key not in ("prompt", "answer", "finish")}


def error_json(error: EdgeComposeError) -> Json:
    """An error as that API gives it."""
    code, param = None, None
    if isinstance(error, ApiError):
        code, param = error.code, error.param
    elif isinstance(error, PromptTooLong):
        code = "context_length_exceeded"
    return {"error": {"message": str(error), "type": "invalid_request_error", "param": param, "code": code}}


def _said(kind: Kind, text: str) -> Json:
    return {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}


def _piece(kind: Kind, text: str, first: bool, *, ending: bool = False) -> Json:
    if kind == "text":
        return {"text": text, "logprobs": None}
    role = {"role": "assistant"} if first else {}
    return {"delta": {} if ending else {**role, "content": text}, "logprobs": None}


def _chunk(asked: Asked, name: str, choice: Json | None) -> Json:
    return {
        "id": name, "object": "chat.completion.chunk" if asked.kind == "chat" else "text_completion",
        "created": int(time.time()), "model": asked.model, "choices": [] if choice is None else [choice],
    }  # fmt: skip


def _usage(answers: Sequence[Answer]) -> Json:
    prompt, generated = (sum(getattr(a, field) for a in answers) for field in ("prompt_tokens", "generated_tokens"))
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    found = fields.get("messages")
    if not isinstance(found, list) or not found:
        raise ApiError("'messages' is missing or empty; a list of messages is wanted", param="messages")
    return conversation([_message(one) for one in found])


def _message(found: object) -> Message:
    fields = _object(found, "a message")
    role, content = fields.get("role"), fields.get("content")
    if fields.get("tool_calls") or role in ("tool", "function"):
        raise ApiError("a message calls a tool, which is not supported; leave it out", param="messages")
    if isinstance(content, list):
        parts = [_object(part, "a part of a message") for part in content]
        other = next((part.get("type") for part in parts if part.get("type") != "text"), None)
        if other is not None:
            raise ApiError(f"a message has a part of type {other!r:.80}; only text is read", param="messages")
        content = "".join(str(part.get("text", "")) for part in parts)
    return Message("system" if role == "developer" else role, content)  # type: ignore[arg-type]  # checked by Message


def _texts(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = fields.get(name)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not (texts or name == "stop") or not all(isinstance(text, str) for text in texts):
        raise ApiError(f"'{name}' is {found!r:.80}; text or a list of texts is wanted", param=name)
    return tuple(texts)


def _sampling(call: _Call) -> Sampling | None:
    """How tokens are drawn; the likeliest, always, where nothing is said of it."""
    if all(value is None for value in (call.temperature, call.top_p, call.top_k, call.min_p)):
        return None if call.repetition_penalty == 1 else Sampling(0, repetition_penalty=call.repetition_penalty)
    return Sampling(
        given(call.temperature, 1.0), given(call.top_p, 1.0), call.seed, given(call.top_k, 0), given(call.min_p, 0.0),
        call.repetition_penalty,
    )  # fmt: skip


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stops = () if fields.get("stop") is None else _texts(fields, "stop")
    if len(stops) > _STOPS:
        raise ApiError(f"{len(stops)} stop strings are given; {_STOPS} at most are wanted", param="stop")
    return stops


def _typed(kind: type[T], found: Mapping[str, Any], place: str) -> T:
    """Fields as a dataclass, checked; null stands for a field that was left out."""
    try:
        return value_from_json(kind, _without_null(found), place)
    except ManifestInvalid as error:
        raise ApiError(str(error)) from error


def _without_null(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: _without_null(value) for name, value in found.items() if value is not None}
    return found


def _object(found: object, what: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise ApiError(f"{what} is {found!r:.80}; a JSON object is wanted")
    return found
