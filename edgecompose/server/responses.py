"""Responses in the form of the OpenAI API, as JSON.

`edgecompose` in every response explains how its answer was computed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from edgecompose.errors import ApiError, DeviceError, EdgeComposeError, FileDamaged, PromptTooLong
from edgecompose.request import Answer, Composition
from edgecompose.serialize import answer_json, composition_json
from edgecompose.server.protocol import ApiCall, Kind

Json = dict[str, Any]
#: What of an explanation is sent before the first token.
_KNOWN_FIRST = ("method", "weights", "distribution", "composition")
#: Beginnings of ids, as OpenAI's API has them.
_ID_PREFIXES = {"chat": "chatcmpl", "text": "cmpl"}


def new_id(kind: str) -> str:
    """A fresh id for a response of an endpoint, by its kind of answers or its method."""
    return f"{_ID_PREFIXES.get(kind, kind)}-{uuid.uuid4().hex}"


def response(call: ApiCall, answers: Sequence[Answer], name: str, *, changed: bool = False) -> Json:
    """A whole response.

    Args:
        changed: the bundle on disk is another one than answered.
    """
    explained = [explanation(call, answer, changed=changed) for answer in answers]
    shown = {"edgecompose": explained if len(answers) > 1 else explained[0]} if any(explained) else {}
    return {
        "id": name,
        "object": "chat.completion" if call.kind == "chat" else "text_completion",
        "created": int(time.time()),
        "model": call.model,
        "choices": [
            {"index": index, **_content(call.kind, answer.text), "logprobs": None, "finish_reason": answer.finish}
            for index, answer in enumerate(answers)
        ],
        "usage": _usage(answers),
        **shown,
    }


def first_chunk(call: ApiCall, name: str, composition: Composition, *, index: int = 0) -> Json:
    """The beginning of a streamed answer, before its first token: the blend that was chosen, without neighbours."""
    beginning = {"index": index, **_delta(call.kind, "", True), "finish_reason": None}
    explained = {k: v for k, v in composition_json(composition).items() if k in _KNOWN_FIRST} if call.explain else {}
    return {**_chunk(call, name, beginning), **({"edgecompose": explained} if explained else {})}


def chunk(call: ApiCall, name: str, text: str, *, index: int = 0) -> Json:
    """One chunk of a streamed answer."""
    return _chunk(call, name, {"index": index, **_delta(call.kind, text, False), "finish_reason": None})


def last_chunk(call: ApiCall, name: str, answer: Answer, *, index: int = 0, changed: bool = False) -> Json:
    """The last chunk of a streamed answer, with its explanation; `changed` as in `response`."""
    ending = {"index": index, **_delta(call.kind, "", False, ending=True), "finish_reason": answer.finish}
    explained = explanation(call, answer, changed=changed)
    return {**_chunk(call, name, ending), **({"edgecompose": explained} if explained else {})}


def usage_chunk(call: ApiCall, name: str, answers: Sequence[Answer]) -> Json:
    """The number of tokens, as the last chunk of a stream with `include_usage`."""
    return {**_chunk(call, name, None), "usage": _usage(answers)}


def explanation(call: ApiCall, answer: Answer, *, changed: bool) -> Json:
    """How an answer was computed, without the fields that the response has elsewhere.

    Empty where the call wants none, but for scores and a changed bundle.
    """
    fields = answer_json(answer)
    left_out = ("prompt", "answer", "finish") if call.explain else [name for name in fields if name != "choices"]
    explained = {key: value for key, value in fields.items() if key not in left_out}
    return {**explained, "bundle_changed": True} if changed else explained


def error_json(error: EdgeComposeError) -> Json:
    """An error as that API gives it."""
    code, param = None, None
    if isinstance(error, ApiError):
        code, param = error.code, error.param
    elif isinstance(error, PromptTooLong):
        code = "context_length_exceeded"
    kind = "invalid_request_error" if status_of(error) < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def status_of(error: EdgeComposeError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, ApiError):
        return error.status
    return 500 if isinstance(error, (FileDamaged, DeviceError)) else 400


def bundle_changed(error: Exception) -> ApiError:
    """The error of a call that needs a file of a bundle that is another one on disk than was opened."""
    return ApiError(
        f"the bundle on disk was changed while the server ran ({error!s:.200}); restart the server",
        code="bundle_changed",
        status=503,
    )


def _content(kind: Kind, text: str) -> Json:
    return {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}


def _delta(kind: Kind, text: str, first: bool, *, ending: bool = False) -> Json:
    if kind == "text":
        return {"text": text, "logprobs": None}
    role = {"role": "assistant"} if first else {}
    return {"delta": {} if ending else {**role, "content": text}, "logprobs": None}


def _chunk(call: ApiCall, name: str, choice: Json | None) -> Json:
    return {
        "id": name,
        "object": "chat.completion.chunk" if call.kind == "chat" else "text_completion",
        "created": int(time.time()),
        "model": call.model,
        "choices": [] if choice is None else [choice],
    }


def _usage(answers: Sequence[Answer]) -> Json:
    prompt, generated = (sum(getattr(a, field) for a in answers) for field in ("prompt_tokens", "generated_tokens"))
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
