"""Calls in the form of the OpenAI API, parsed to frozen values.

Fields that would change an answer and are not supported are refused by name (`unsupported`); others (`user`,
`metadata`) are ignored.
Beyond that API: `adapters` (name -> weight) composes by hand, every field of `settings.Sampling` may be set, and
`edgecompose` holds retrieval and merge settings. Without temperature, top_p, top_k or min_p, decoding is greedy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from edgecompose.bundle.manifest import Defaults
from edgecompose.bundle.records import replace_from_json, shown, value_from_json
from edgecompose.composer import Composer
from edgecompose.errors import ApiError, EdgeComposeError
from edgecompose.generation.messages import Overflow, Prompt, RouteBy
from edgecompose.merging.methods import method_of, require_parameters
from edgecompose.request import Request
from edgecompose.server.config import CallLimits
from edgecompose.server.conversations import parse_messages
from edgecompose.server.unsupported import refuse_unsupported
from edgecompose.settings import MergeSettings, RetrievalSettings, Sampling, names_of, resolve

T = TypeVar("T")
Kind = Literal["chat", "text"]

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
    special_tokens: bool | None = None
    drafts: int | None = None
    explain: bool = True


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

    `usage` is whether a stream ends with the number of tokens, `explain` whether the response explains the answer.
    """

    kind: Kind
    model: str
    prompts: tuple[Prompt, ...]
    request: Request
    stream: bool = False
    usage: bool = False
    explain: bool = True


def parse_call(kind: Kind, body: object, *, defaults: Defaults, limits: CallLimits, context: int) -> ApiCall:
    """A call to /v1/chat/completions ('chat') or /v1/completions ('text').

    Args:
        body: the parsed JSON.
        defaults: the bundle's settings, some of which `edgecompose` may change.
        context: tokens of the base's context.

    Raises:
        ApiError: a field is missing, malformed, or not supported.
        EdgeComposeError: a value is out of its range, or a setting has no effect.
    """
    fields = _object(body, "the request")
    refuse_unsupported(fields)
    prompts: tuple[Prompt, ...]
    if kind == "chat":
        prompts = (parse_messages(fields.get("messages"), limits.messages),)
    else:
        prompts = _texts(fields, "prompt", limits.prompts)
    present = {name: _without_null(value) for name, value in fields.items() if value is not None}
    call = value_from_json(_Fields, _some(present, names_of(_Fields)), "request", ApiError)
    request = _checked(
        {name: name for name in present},
        Request,
        weights=call.adapters,
        max_tokens=_longest(
            resolve(call.max_completion_tokens, call.max_tokens),
            limits.max_tokens,
            default=defaults.max_tokens,
            context=context,
        ),
        sampling=_sampling(_some(present, names_of(Sampling))),
        stop=_stops(fields, limits),
        raw=None if kind == "chat" else True,
        prompt_cache=kind == "chat",
    )
    request, explain = _with_own(request, call.edgecompose, defaults, limits)
    return ApiCall(kind, call.model, prompts, request, call.stream, call.stream_options.include_usage, explain)


def model_names(composer: Composer) -> list[str]:
    """The values of `model`: `auto` retrieves, `base` uses no adapter, `task:NAME` those that a task is mapped to."""
    return ["auto", "base", *(f"task:{name}" for name in composer.bundle.manifest.tasks)]


def unknown_model(name: str, known: Collection[str]) -> ApiError:
    """There is no such model."""
    near = f"did you mean 'task:{name}'? " if f"task:{name}" in known else ""
    return ApiError(
        f"no model is called '{name:.80}'; {near}use auto, base or task:NAME, as /v1/models lists them "
        "(serve --model-alias gives auto another name)",
        param="model",
        code="model_not_found",
        status=404,
    )


def call_of(
    composer: Composer, kind: Kind, body: object, limits: CallLimits, *, aliases: Collection[str] = ()
) -> ApiCall:
    """A call to a composer: parsed, with the weights that its model stands for.

    Args:
        aliases: other names of the model `auto`.

    Raises:
        ApiError: a field is missing, malformed, or not supported.
        EdgeComposeError: a value is out of its range, or a setting has no effect.
    """
    manifest = composer.bundle.manifest
    call = parse_call(kind, body, defaults=manifest.defaults, limits=limits, context=manifest.base.context)
    known = model_names(composer)
    if call.model == "auto" or call.model in aliases:
        return call
    if call.model not in known:
        raise unknown_model(call.model, known)
    if call.request.weights is not None:
        raise ApiError(f"'adapters' and the model '{call.model}' exclude each other; use 'auto'", param="adapters")
    _refuse_retrieval(call.request, f"the model '{call.model}'")
    task = call.model.removeprefix("task:")
    weights = {} if call.model == "base" else composer.retriever.adapters_for({task: 1.0})
    return dataclasses.replace(call, request=dataclasses.replace(call.request, weights=weights))


def parse_inputs(body: object, limits: CallLimits) -> tuple[tuple[str, ...], bool]:
    """Texts of a call to /v1/embeddings, and whether vectors are returned in base64.

    Raises:
        ApiError: a field is missing, malformed, or not supported.
    """
    fields = _object(body, "the request")
    refuse_unsupported(_some(fields, ("dimensions", "truncate_prompt_tokens")))
    form = fields.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise ApiError(f"encoding_format is {shown(form)}; expected float or base64", param="encoding_format")
    return _texts(fields, "input", limits.inputs), form == "base64"


def _longest(value: int | None, most: int | None, *, default: int | None, context: int) -> int | None:
    """The longest answer; None, the bundle's default, where neither the call nor the server has a limit.

    -1 is no limit, as llama.cpp has it: the answer may fill the context.

    Raises:
        ApiError: `value` is 0 or another negative number.
    """
    if value is None:
        return most if most is None else min(resolve(default, most), most)
    if value != -1 and value < 1:
        raise ApiError(f"max_tokens is {shown(value)}; expected 1 or more, or -1 for no limit", param="max_tokens")
    return min(context if value == -1 else value, resolve(most, context), context)


def _texts(fields: Mapping[str, Any], name: str, most: int) -> tuple[str, ...]:
    value = fields.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not (texts or name == "stop") or not all(isinstance(text, str) for text in texts):
        hint = "; token ids are not read (in LangChain: check_embedding_ctx_length=False)" if _is_ids(value) else ""
        raise ApiError(f"'{name}' is {shown(value)}; expected a string or a list of strings{hint}", param=name)
    if len(texts) > most:
        raise ApiError(f"'{name}' holds {len(texts)} strings; expected {most} at most", param=name)
    return tuple(texts)


def _is_ids(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, int) or (isinstance(first, list) and all(isinstance(item, int) for item in first))


def _sampling(values: Mapping[str, Any]) -> Sampling | None:
    """How tokens are drawn; greedily with only a seed or a penalty.

    A `top_k` of -1 is none, as in vLLM. A `top_p` of 0 leaves the most likely token, so it is greedy.
    """
    values = dict(values)
    if values.get("top_k") == -1:
        values["top_k"] = 0
    if values.get("top_p") == 0 and not isinstance(values["top_p"], bool):
        values |= {"top_p": 1, "temperature": 0}
    if set(values) <= {"seed", "repetition_penalty"}:
        penalty = _some(values, ("repetition_penalty",))
        return _replaced(Sampling(temperature=0), penalty, "request") if penalty else None
    return _replaced(Sampling(temperature=1.0, top_p=1.0), values, "request")


def _with_own(request: Request, own: Mapping[str, Any], defaults: Defaults, limits: CallLimits) -> tuple[Request, bool]:
    """A request with what `edgecompose` says, and whether to explain the answer.

    Retrieval and merge settings begin with the bundle's.
    """
    for old, new in _RENAMED.items():
        if old in own:
            raise ApiError(f"'{old}' in 'edgecompose' is called '{new}' now; use that name", param=f"edgecompose.{old}")
    retrieval, merge = (_some(own, names_of(kind)) for kind in (RetrievalSettings, MergeSettings))
    rest = {name: value for name, value in own.items() if name not in retrieval and name not in merge}
    own_fields = dataclasses.asdict(value_from_json(_Own, rest, "request.edgecompose", ApiError))
    explain = own_fields.pop("explain")
    changes = {name: value for name, value in own_fields.items() if value is not None}
    _check_choices(changes.get("choices", ()), limits)
    if retrieval:
        changes["retrieval"] = _replaced(defaults.retrieval, retrieval, "request.edgecompose")
    if merge:
        changes["merge"] = _replaced(defaults.merge, merge, "request.edgecompose")
        require_parameters(merge, [method_of(changes["merge"]).name])
    request = _checked({f"edgecompose.{name}": name for name in own}, dataclasses.replace, request, **changes)
    if request.weights is not None:
        _refuse_retrieval(request, "'adapters'")
    return request, explain


def _check_choices(choices: Collection[str], limits: CallLimits) -> None:
    characters = sum(map(len, choices))
    if len(choices) > limits.choices or characters > limits.choice_characters:
        raise ApiError(
            f"{len(choices)} choices of {characters} characters; "
            f"expected {limits.choices} at most, of {limits.choice_characters} characters together",
            param="edgecompose.choices",
        )


def _replaced(record: T, values: Mapping[str, Any], place: str) -> T:
    """A record of settings with some fields set; an error names the field."""
    inside = place.partition(".")[2]
    names = {f"{inside}.{name}" if inside else name: name for name in values}
    replaced: T = _checked(names, replace_from_json, record, values, place, ApiError)
    return replaced


def _checked(names: Mapping[str, str], make: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """What `make` returns; an error of another kind that begins with the name of a field becomes one of that field.

    Args:
        names: path of a field in the call -> its name in messages.
    """
    try:
        return make(*arguments, **settings)
    except ApiError:
        raise
    except EdgeComposeError as error:
        starts = ((path, (f"{name} ", f"a {name} ")) for path, name in names.items())
        param = next((path for path, start in starts if str(error).startswith(start)), None)
        raise ApiError(str(error), param=param) from error


def _refuse_retrieval(request: Request, reason: str) -> None:
    """Retrieval settings have no effect on a blend by hand."""
    if request.retrieval is not None or request.exclude:
        name = "exclude" if request.exclude else ", ".join(names_of(RetrievalSettings))
        raise ApiError(f"{reason} composes without retrieval, so {name} has no effect; leave one of them out")


def _stops(fields: Mapping[str, Any], limits: CallLimits) -> tuple[str, ...]:
    stops = () if fields.get("stop") is None else _texts(fields, "stop", limits.stops)
    longest = max(map(len, stops), default=0)
    if longest > limits.stop_characters:
        raise ApiError(
            f"a stop string has {longest} characters; expected {limits.stop_characters} at most", param="stop"
        )
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
        raise ApiError(f"{what} is {shown(value)}; expected a JSON object")
    return value
