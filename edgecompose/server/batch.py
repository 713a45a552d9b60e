"""Calls of the OpenAI API in a JSONL file, answered into another, as its batch API has them.

A line of the first is `{"custom_id", "method": "POST", "url": "/v1/chat/completions" or "/v1/completions", "body"}`, a
line of the second `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`, in the same order.
No answer depends on the others: sequences of earlier calls are not gone on with.
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

from edgecompose.bundle.records import value_from_json
from edgecompose.composer import Composer
from edgecompose.errors import ApiError, EdgeComposeError, ManifestInvalid
from edgecompose.request import Answer
from edgecompose.server import protocol, responses
from edgecompose.server.protocol import ApiCall, Kind
from edgecompose.server.responses import Json

_KINDS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}


@dataclass(frozen=True, slots=True)
class BatchCall:
    """A line of the file: what a caller knows it by, where it would be sent to, and what."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


def read_calls(path: Path) -> list[BatchCall]:
    """The calls of a file, blank lines passed over.

    Raises:
        ApiError: a line is no call, or has the `custom_id` of another; the message names it.
        OSError: the file cannot be read.
    """
    calls: dict[str, BatchCall] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            call = value_from_json(BatchCall, json.loads(line), "call")
        except (ValueError, RecursionError, ManifestInvalid) as error:
            raise ApiError(f"{place} is no call ({error}); expected custom_id, url and body, one a line") from error
        if call.url not in _KINDS or call.method != "POST":
            raise ApiError(f"{place} is {call.method} {call.url:.80}; use POST and {' or '.join(_KINDS)}")
        if call.custom_id in calls:
            raise ApiError(f"{place} has the custom_id {call.custom_id:.80} of another line; give each its own")
        calls[call.custom_id] = call
    return list(calls.values())


def answer_calls(
    composer: Composer,
    calls: list[BatchCall],
    output: Path,
    *,
    max_tokens: int,
    parallel: int | None = None,
    advance: Callable[[float], object] = lambda count: None,
) -> tuple[int, int]:
    """Append the result of each call to `output`; calls that it has results of already are not answered again.

    Args:
        max_tokens: the longest answer that may be asked for.
        parallel: answers that are written at once, as `Composer.batch` has it.
        advance: called with 1 for each call.

    Returns:
        How many calls were answered now, and how many of those gave an error.

    Raises:
        ApiError: the file holds something else.
        OSError: it cannot be read or written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    with output.open("a+b") as file:
        file.seek(0)
        known, end = _results(file.read(), output)
        file.truncate(end)
        advance(sum(call.custom_id in known for call in calls))
        calls = [call for call in calls if call.custom_id not in known]
        parsed = [_parsed(composer, call, max_tokens) for call in calls]
        items = [(prompt, a.request) for a in parsed if isinstance(a, ApiCall) for prompt in a.prompts]
        with closing(composer.batch([p for p, _ in items], [r for _, r in items], parallel=parallel)) as answers:
            for call, asked in zip(calls, parsed, strict=True):
                result = _result(call, asked, answers)
                failures += result["error"] is not None
                file.write(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                file.flush()
                advance(1)
    return len(calls), failures


def _parsed(composer: Composer, call: BatchCall, max_tokens: int) -> ApiCall | EdgeComposeError:
    try:
        asked = protocol.call_of(composer, _KINDS[call.url], call.body, max_tokens=max_tokens)
        if asked.stream:
            raise ApiError("'stream' is true, which a file has no use for; leave it out", param="stream")
        return dataclasses.replace(asked, request=dataclasses.replace(asked.request, prompt_cache=False))
    except EdgeComposeError as error:
        return error


def _result(
    call: BatchCall, asked: ApiCall | EdgeComposeError, answers: Iterator[Answer | EdgeComposeError]
) -> dict[str, Any]:
    """The line of a call, its answers taken from all."""
    name = responses.new_id(_KINDS[call.url])
    found = [asked] if isinstance(asked, EdgeComposeError) else list(itertools.islice(answers, len(asked.prompts)))
    said = [a for a in found if isinstance(a, Answer)]
    error = next((a for a in found if isinstance(a, EdgeComposeError)), None)
    body: Json
    if error is None and isinstance(asked, ApiCall):
        status, body = 200, responses.response(asked, said, name)
    else:
        assert error is not None
        status, body = getattr(error, "status", 400), responses.error_json(error)
    return {
        "id": name,
        "custom_id": call.custom_id,
        "response": {"status_code": status, "request_id": name, "body": body},
        "error": None if error is None else {"code": type(error).__name__, "message": str(error)},
    }


def _results(content: bytes, path: Path) -> tuple[set[str], int]:
    """What calls a file has results of, and where its last whole line ends; what follows was cut off."""
    known: set[str] = set()
    end = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:end].splitlines(), 1):
        try:
            found = json.loads(line)
            known.add(str(found["custom_id"]))
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise ApiError(f"{path}:{number} is no result of a batch; give another file") from error
    if end < len(content) and not content[end:].startswith(b'{"id": "'[: len(content) - end]):
        raise ApiError(f"{path} ends in a line that is no result of a batch; give another file")
    return known, end
