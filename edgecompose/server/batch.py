"""Answers a file of OpenAI API calls into another, in the form of OpenAI's batch API.

A line of the first is `{"custom_id", "method": "POST", "url", "body"}`, where `url` is a path of the table of
endpoints. A line of the second is `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`, in
the same order. Answers are independent of each other: none continues the sequence of an earlier one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompose.bundle.jsonl import open_resumable, read_lines
from edgecompose.bundle.records import value_from_json
from edgecompose.cancellation import Cancellation
from edgecompose.composer import Composer
from edgecompose.errors import ApiError, EdgeComposeError, ManifestInvalid
from edgecompose.request import Answer
from edgecompose.server import json_text, protocol, responses
from edgecompose.server.config import CallLimits
from edgecompose.server.endpoints import BY_PATH, Work, run_steps
from edgecompose.server.protocol import ApiCall
from edgecompose.server.responses import Json

#: A call that was checked: prompts to answer, the computation of a result, or why neither is possible.
_Parsed = ApiCall | Work | EdgeComposeError
#: How every line of results begins, by which an incomplete line is known.
_START = b'{"id": "'


@dataclass(frozen=True, slots=True)
class BatchCall:
    """A line of the file: the caller's name for it, the path it is for, and its body."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


def read_calls(path: Path) -> list[BatchCall]:
    """The calls of a file; blank lines are skipped.

    Raises:
        ApiError: a line is no call, or has the `custom_id` of another; the message names it.
        OSError: the file cannot be read.
    """
    calls: dict[str, BatchCall] = {}
    for place, fields in read_lines(path, ApiError):
        try:
            call = value_from_json(BatchCall, fields, "call")
        except ManifestInvalid as error:
            raise ApiError(f"{place} is no call ({error}); expected custom_id, url and body, one a line") from error
        json_text.check(call.custom_id, f"the custom_id of {place}")
        if call.url not in BY_PATH or call.method != "POST":
            raise ApiError(f"{place} is {call.method} {call.url:.80}; use POST and {' or '.join(BY_PATH)}")
        if call.custom_id in calls:
            raise ApiError(f"{place} has the custom_id {call.custom_id:.80} of another line; give each its own")
        calls[call.custom_id] = call
    return list(calls.values())


def answer_calls(
    composer: Composer,
    calls: list[BatchCall],
    output: Path,
    *,
    max_tokens: int | None = None,
    parallel: int | None = None,
    advance: Callable[[float], object] = lambda count: None,
) -> tuple[int, int]:
    """Append the result of each call to `output`; calls whose results it holds already are not answered again.

    Args:
        max_tokens: upper bound of `max_tokens` of a call; None is as long as the context.
        parallel: concurrent answers, as in `Composer.batch`.
        advance: called with 1 for each call.

    Returns:
        How many calls were answered now, and how many of those gave an error.

    Raises:
        ApiError: the file holds something else.
        OSError: it cannot be read or written.
    """
    failures = 0
    with open_resumable(
        output, lambda line: str(line["custom_id"]), start=_START, error=ApiError, content="result of a batch"
    ) as file:
        answered = set(file.earlier)
        advance(sum(call.custom_id in answered for call in calls))
        calls = [call for call in calls if call.custom_id not in answered]
        parsed = [_parse(composer, call, CallLimits(max_tokens=max_tokens)) for call in calls]
        items = [(prompt, p.request) for p in parsed if isinstance(p, ApiCall) for prompt in p.prompts]
        with closing(composer.batch([p for p, _ in items], [r for _, r in items], parallel=parallel)) as answers:
            for call, work in zip(calls, parsed, strict=True):
                result = _result(call, work, answers)
                failures += result["error"] is not None
                file.append(json.dumps(result, ensure_ascii=False))
                advance(1)
    return len(calls), failures


def _parse(composer: Composer, call: BatchCall, limits: CallLimits) -> _Parsed:
    action = BY_PATH[call.url].action
    try:
        json_text.check(call.body, "the body")
        if not isinstance(action, str):
            return action(composer, call.body, limits)
        api_call = protocol.call_of(composer, action, call.body, limits)
        if api_call.stream:
            raise ApiError("'stream' is true, which has no effect in a file; leave it out", param="stream")
        return dataclasses.replace(api_call, request=dataclasses.replace(api_call.request, prompt_cache=False))
    except EdgeComposeError as error:
        return error


def _result(call: BatchCall, work: _Parsed, answers: Iterator[Answer | EdgeComposeError]) -> Json:
    """The line of a call; its answers are the next of `answers`."""
    action = BY_PATH[call.url].action
    name = responses.new_id(action if isinstance(action, str) else BY_PATH[call.url].method)
    try:
        body, error = _body(work, answers, name), None
    except EdgeComposeError as reason:
        body, error = responses.error_json(reason), reason
    status = 200 if error is None else responses.status_of(error)
    return {
        "id": name,
        "custom_id": call.custom_id,
        "response": {"status_code": status, "request_id": name, "body": body},
        "error": None if error is None else {"code": type(error).__name__, "message": str(error)},
    }


def _body(work: _Parsed, answers: Iterator[Answer | EdgeComposeError], name: str) -> Json:
    """The body of a response.

    Raises:
        EdgeComposeError: the call, or one of its prompts, cannot be answered.
    """
    if isinstance(work, EdgeComposeError):
        raise work
    if not isinstance(work, ApiCall):
        cancellation = Cancellation()
        return run_steps(work(cancellation), cancellation)
    results = list(itertools.islice(answers, len(work.prompts)))
    complete = [result for result in results if isinstance(result, Answer)]
    for result in results:
        if isinstance(result, EdgeComposeError):
            raise result
    return responses.response(work, complete, name)
