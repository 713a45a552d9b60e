"""The table of endpoints that HTTP, JSON-RPC lines and batch files share.

To add an endpoint, write a function here and add a row. All three transports, the metrics and the reference follow.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from edgecompose.cancellation import Cancellation
from edgecompose.composer import Composer
from edgecompose.generation.messages import conversation, query_text
from edgecompose.serialize import composition_json
from edgecompose.server import protocol
from edgecompose.server.config import CallLimits
from edgecompose.server.protocol import ApiCall, Kind
from edgecompose.server.responses import Json

#: A computation that yields between its steps, so that others have their turn, and returns a result. It looks at the
#: cancellation within a step.
Steps = Generator[None, None, Json]
#: Begins a computation.
Work = Callable[[Cancellation], Steps]
#: Checks a body and returns the computation of its result.
Prepare = Callable[[Composer, object, CallLimits], Work]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row: an endpoint that generates answers of a kind, or one that computes a result.

    Attributes:
        method: its name in JSON-RPC.
        path: where HTTP requests (POST) and lines of a batch file send it.
        help: what it gives, for the reference.
        action: the kind of answers that it generates; or a function that checks a body, raising ApiError, and returns
            the generator function that computes the result, which may use the models and yields between its steps.
    """

    method: str
    path: str
    help: str
    action: Kind | Prepare


def next_step(steps: Steps) -> Json | None:
    """Compute one step; the result after the last, None before."""
    try:
        next(steps)
    except StopIteration as end:
        result: Json = end.value
        return result
    return None


def run_steps(steps: Steps, cancellation: Cancellation) -> Json:
    """The result of a computation, all its steps at once.

    Raises:
        Cancelled: another thread ended it.
    """
    while True:
        cancellation.check()
        result = next_step(steps)
        if result is not None:
            return result


def _prepare_composition(composer: Composer, body: object, limits: CallLimits) -> Work:
    call = protocol.call_of(composer, "chat", body, limits)
    return functools.partial(_composition, composer, call)


def _composition(composer: Composer, call: ApiCall, cancellation: Cancellation) -> Steps:
    composition = composer.compose(call.prompts[0], call.request, cancellation=cancellation)
    query = query_text(conversation(call.prompts[0]), call.request.route_by)
    yield
    return {"object": "composition", "prompt": query, **composition_json(composition)}


def _prepare_embeddings(composer: Composer, body: object, limits: CallLimits) -> Work:
    texts, as_base64 = protocol.parse_inputs(body, limits)
    return functools.partial(_embeddings, composer, texts, as_base64)


def _embeddings(composer: Composer, texts: Sequence[str], as_base64: bool, cancellation: Cancellation) -> Steps:
    data: list[Json] = []
    tokens = 0
    for index, text in enumerate(texts):
        vector, count = composer.embed(text)
        tokens += count
        shown = _base64(vector) if as_base64 else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": shown})
        yield
    return {
        "object": "list",
        "data": data,
        "model": composer.bundle.manifest.embedder.source,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _base64(vector: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode("ascii")


_ROWS = (
    Endpoint("chat", "/v1/chat/completions", "the answer to a conversation", "chat"),
    Endpoint("complete", "/v1/completions", "the answer to each of some raw prompts", "text"),
    Endpoint("embed", "/v1/embeddings", "the vectors of texts", _prepare_embeddings),
    Endpoint("compose", "/v1/compose", "the blend that a chat call is answered with", _prepare_composition),
)
#: JSON-RPC method -> row, and path -> row.
BY_METHOD: Mapping[str, Endpoint] = MappingProxyType({row.method: row for row in _ROWS})
BY_PATH: Mapping[str, Endpoint] = MappingProxyType({row.path: row for row in _ROWS})
