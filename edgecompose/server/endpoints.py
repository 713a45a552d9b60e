"""The table of endpoints that HTTP, JSON-RPC lines and batch files share.

To add an endpoint, write a function here and add a row. All three transports, the metrics and the reference follow.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from edgecompose.composer import Composer
from edgecompose.generation.messages import conversation, query_text
from edgecompose.serialize import composition_json
from edgecompose.server import protocol
from edgecompose.server.protocol import ApiCall, Kind
from edgecompose.server.responses import Json

#: Checks a body and returns what computes its result; the last argument is the longest answer, in tokens.
Prepare = Callable[[Composer, object, int], Callable[[], Json]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row: an endpoint that generates answers of a kind, or one that computes a result.

    Attributes:
        method: its name in JSON-RPC.
        path: where HTTP requests (POST) and lines of a batch file send it.
        help: what it gives, for the reference.
        action: the kind of answers that it generates; or a function that checks a body, raising ApiError, and returns
            the function that computes the result, which may use the models.
    """

    method: str
    path: str
    help: str
    action: Kind | Prepare


def _prepare_composition(composer: Composer, body: object, max_tokens: int) -> Callable[[], Json]:
    call = protocol.call_of(composer, "chat", body, max_tokens=max_tokens)
    return functools.partial(_composition, composer, call)


def _composition(composer: Composer, call: ApiCall) -> Json:
    composition = composer.compose(call.prompts[0], call.request)
    query = query_text(conversation(call.prompts[0]), call.request.route_by)
    return {"object": "composition", "prompt": query, **composition_json(composition)}


def _prepare_embeddings(composer: Composer, body: object, max_tokens: int) -> Callable[[], Json]:
    texts, as_base64 = protocol.parse_inputs(body)
    return functools.partial(_embeddings, composer, texts, as_base64=as_base64)


def _embeddings(composer: Composer, texts: Sequence[str], *, as_base64: bool) -> Json:
    embedded = [composer.embed(text) for text in texts]
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if as_base64 else vector.tolist()}
        for index, (vector, _) in enumerate(embedded)
    ]
    tokens = sum(count for _, count in embedded)
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
