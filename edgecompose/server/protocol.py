"""Calls in the form of the OpenAI API, parsed to frozen values.

Fields that would change an answer and are not supported are refused by name; others (`user`, `metadata`) are ignored.
Beyond that API: `adapters` (name -> weight) composes by hand, every field of `settings.Sampling` may be set, and
`edgecompose` holds retrieval and merge settings. Without temperature, top_p, top_k or min_p, decoding is greedy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgecompose.bundle.manifest import Defaults
from edgecompose.bundle.records import replace_from_json, value_from_json
from edgecompose.composer import Composer
from edgecompose.errors import ApiError
from edgecompose.generation.messages import Message, Overflow, Prompt, RouteBy, conversation
from edgecompose.merging.methods import method_of, require_parameters
from edgecompose.request import Request
from edgecompose.settings import MergeSettings, RetrievalSettings, Sampling, names_of, resolve

Kind = Literal["chat", "text"]

#: Fields that are accepted only with a value that changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
_STOPS = 16


#: Fields of `edgecompose` that had another name, or another meaning, before schema 5.
_RENAMED = {
    "temperature": "routing_temperature",
    "size_correction": "class_size_exponent",
    "seed": "dare_seed",
    "query": "route_by",
    "reuse": "prompt_cache",
}


@dataclass(frozen=True, slots=True)
class _StreamOptions:
    include_usage: bool = False
    include_obfuscation: bool = False


@dataclass(frozen=True, slots=True)
class _Own:
    """Fields of `edgecompose` in a call beside retrieval and merge settings; null keeps the endpoint's default."""

    exclude: tuple[str, ...] | None = None
    raw: bool | None = None
    route_by: RouteBy | None = None
    overflow: Overflow | None = None
    choices: tuple[str, ...] | None = None
    prompt_cache: bool | None = None


@dataclass(frozen=True, slots=True)
class _Fields:
    """Fields of a call beside those of sampling, and `messages`, `prompt` and `stop`, which have several forms."""

    model: str = "auto"
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    adapters: dict[str, float] | None = None
    edgecompose: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ApiCall:
    """One parsed call: prompts, each to be answered as `request` says; `model` is the name in the call.

    `usage` is whether a stream ends with the number of tokens.
    """

    kind: Kind
    model: str
    prompts: tuple[Prompt, ...]
    request: Request
    stream: bool = False
    usage: bool = False


def parse_call(kind: Kind, body: object, *, defaults: Defaults, max_tokens: int) -> ApiCall:
    """A call to /v1/chat/completions ('chat') or /v1/completions ('text').

    Args:
        body: the parsed JSON.
        defaults: the bundle's settings, some of which `edgecompose` may change.
        max_tokens: upper bound of `max_tokens` of a call.

    Raises:
        ApiError: a field is missing, malformed, or not supported.
        EdgeComposeError: a value is out of its range, or a setting has no effect.
    """
    fields = _object(body, "the request")
    for name, neutral in _NEUTRAL.items():
        if fields.get(name) is not None and fields[name] not in neutral:
            raise ApiError(f"'{name}' is {fields[name]!r:.80}, which is not supported; leave it out", param=name)
    prompts: tuple[Prompt, ...] = (_messages(fields),) if kind == "chat" else _texts(fields, "prompt")
    present = {name: _without_null(value) for name, value in fields.items() if value is not None}
    call = value_from_json(_Fields, _some(present, names_of(_Fields)), "request", ApiError)
    length = resolve(call.max_completion_tokens, resolve(call.max_tokens, resolve(defaults.max_tokens, max_tokens)))
    length = min(length, max_tokens)
    if length < 1:
        raise ApiError(f"max_tokens is {length}; expected 1 or more", param="max_tokens")
    request = Request(
        weights=call.adapters,
        max_tokens=length,
        sampling=_sampling(_some(present, names_of(Sampling))),
        stop=_stops(fields),
        raw=None if kind == "chat" else True,
        prompt_cache=kind == "chat",
    )
    request = _with_own(request, call.edgecompose, defaults)
    return ApiCall(kind, call.model, prompts, request, call.stream, call.stream_options.include_usage)


def model_names(composer: Composer) -> list[str]:
    """The values of `model`: `auto` retrieves, `base` uses no adapter, `task:NAME` those that a task is mapped to."""
    return ["auto", "base", *(f"task:{name}" for name in composer.bundle.manifest.tasks)]


def unknown_model(name: str) -> ApiError:
    """There is no such model."""
    return ApiError(
        f"no model is called '{name:.80}'; use auto, base or task:NAME, as /v1/models lists them",
        param="model",
        code="model_not_found",
        status=404,
    )


def call_of(composer: Composer, kind: Kind, body: object, *, max_tokens: int) -> ApiCall:
    """A call to a composer: parsed, with the weights that its model stands for.

    Args:
        max_tokens: upper bound of `max_tokens` of a call.

    Raises:
        ApiError: a field is missing, malformed, or not supported.
        EdgeComposeError: a value is out of its range, or a setting has no effect.
    """
    call = parse_call(kind, body, defaults=composer.bundle.manifest.defaults, max_tokens=max_tokens)
    if call.model not in model_names(composer):
        raise unknown_model(call.model)
    if call.model == "auto":
        return call
    if call.request.weights is not None:
        raise ApiError(f"'adapters' and the model '{call.model}' exclude each other; use 'auto'", param="adapters")
    _refuse_retrieval(call.request, f"the model '{call.model}'")
    task = call.model.removeprefix("task:")
    weights = {} if call.model == "base" else composer.retriever.adapters_for({task: 1.0})
    return dataclasses.replace(call, request=dataclasses.replace(call.request, weights=weights))


def parse_inputs(body: object) -> tuple[tuple[str, ...], bool]:
    """Texts of a call to /v1/embeddings, and whether vectors are returned in base64.

    Raises:
        ApiError: a field is missing, malformed, or not supported.
    """
    fields = _object(body, "the request")
    if fields.get("dimensions") is not None:
        raise ApiError("'dimensions' is not supported; leave it out", param="dimensions")
    form = fields.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise ApiError(f"encoding_format is {form!r:.80}; expected float or base64", param="encoding_format")
    return _texts(fields, "input"), form == "base64"


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError("'messages' is missing or empty; expected a list of messages", param="messages")
    return conversation([_message(one) for one in messages])


def _message(value: object) -> Message:
    fields = _object(value, "a message")
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
    value = fields.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not (texts or name == "stop") or not all(isinstance(text, str) for text in texts):
        raise ApiError(f"'{name}' is {value!r:.80}; expected text or a list of texts", param=name)
    return tuple(texts)


def _sampling(values: Mapping[str, Any]) -> Sampling | None:
    """How tokens are drawn; greedily with only a seed or a penalty."""
    if set(values) <= {"seed", "repetition_penalty"}:
        penalty = _some(values, ("repetition_penalty",))
        return replace_from_json(Sampling(temperature=0), penalty, "request", ApiError) if penalty else None
    return replace_from_json(Sampling(temperature=1.0, top_p=1.0), values, "request", ApiError)


def _with_own(request: Request, own: Mapping[str, Any], defaults: Defaults) -> Request:
    """A request with what `edgecompose` says; retrieval and merge settings begin with the bundle's."""
    for old, new in _RENAMED.items():
        if old in own:
            raise ApiError(f"'{old}' in 'edgecompose' is called '{new}' now; use that name", param=f"edgecompose.{old}")
    retrieval, merge = (_some(own, names_of(kind)) for kind in (RetrievalSettings, MergeSettings))
    rest = {name: value for name, value in own.items() if name not in retrieval and name not in merge}
    own_fields = dataclasses.asdict(value_from_json(_Own, rest, "request.edgecompose", ApiError))
    changes = {name: value for name, value in own_fields.items() if value is not None}
    if retrieval:
        changes["retrieval"] = replace_from_json(defaults.retrieval, retrieval, "request.edgecompose", ApiError)
    if merge:
        changes["merge"] = replace_from_json(defaults.merge, merge, "request.edgecompose", ApiError)
        require_parameters(merge, [method_of(changes["merge"]).name])
    request = dataclasses.replace(request, **changes)
    if request.weights is not None:
        _refuse_retrieval(request, "'adapters'")
    return request


def _refuse_retrieval(request: Request, reason: str) -> None:
    """Retrieval settings have no effect on a blend by hand."""
    if request.retrieval is not None or request.exclude:
        name = "exclude" if request.exclude else ", ".join(names_of(RetrievalSettings))
        raise ApiError(f"{reason} composes without retrieval, so {name} has no effect; leave one of them out")


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stops = () if fields.get("stop") is None else _texts(fields, "stop")
    if len(stops) > _STOPS:
        raise ApiError(f"{len(stops)} stop strings; expected {_STOPS} at most", param="stop")
    return stops


def _some(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _without_null(value: Any) -> Any:
    """A value whose objects lack fields that are null: null stands for a field that was left out."""
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    return value


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ApiError(f"{what} is {value!r:.80}; expected a JSON object")
    return value
