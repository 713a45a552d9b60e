"""Responses in the form of the OpenAI API, as JSON.

`edgecompose` in every response explains how its answer was computed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from edgecompose.errors import ApiError, EdgeComposeError, PromptTooLong
from edgecompose.request import Answer
from edgecompose.serialize import answer_json
from edgecompose.server.protocol import ApiCall, Kind

Json = dict[str, Any]
#: Beginnings of ids, as OpenAI's API has them.
_ID_PREFIXES = {"chat": "chatcmpl", "text": "cmpl"}


def new_id(kind: str) -> str:
    """A fresh id for a response of an endpoint, by its kind of answers or its method."""
    return f"{_ID_PREFIXES.get(kind, kind)}-{uuid.uuid4().hex}"


def response(call: ApiCall, answers: Sequence[Answer], name: str) -> Json:
    """A whole response."""
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
        "edgecompose": [explanation(a) for a in answers] if len(answers) > 1 else explanation(answers[0]),
    }


def chunk(call: ApiCall, name: str, text: str, *, index: int = 0, first: bool = False) -> Json:
    """One chunk of a streamed answer."""
    return _chunk(call, name, {"index": index, **_delta(call.kind, text, first), "finish_reason": None})


def last_chunk(call: ApiCall, name: str, answer: Answer, *, index: int = 0) -> Json:
    """The last chunk of a streamed answer, with its explanation."""
    ending = {"index": index, **_delta(call.kind, "", False, ending=True), "finish_reason": answer.finish}
    return {**_chunk(call, name, ending), "edgecompose": explanation(answer)}


def usage_chunk(call: ApiCall, name: str, answers: Sequence[Answer]) -> Json:
    """The number of tokens, as the last chunk of a stream with `include_usage`."""
    return {**_chunk(call, name, None), "usage": _usage(answers)}


def explanation(answer: Answer) -> Json:
    """How an answer was computed, without the fields that the response has elsewhere."""
    fields = answer_json(answer)
    return {key: value for key, value in fields.items() if key not in ("prompt", "answer", "finish")}


def error_json(error: EdgeComposeError) -> Json:
    """An error as that API gives it."""
    code, param = None, None
    if isinstance(error, ApiError):
        code, param = error.code, error.param
    elif isinstance(error, PromptTooLong):
        code = "context_length_exceeded"
    return {"error": {"message": str(error), "type": "invalid_request_error", "param": param, "code": code}}


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
