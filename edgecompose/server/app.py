"""A bundle behind HTTP on this machine: the OpenAI API, the blend alone, health, metrics, and a page to try it on.

Every request passes the same gate first: the Host it was sent to, the Origin of the page that sent it, and the key if
there is one. A page in the user's browser from anywhere else gets nothing.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edgecompose.aio import AsyncComposer
from edgecompose.composer import Composer
from edgecompose.errors import ApiError, DeviceError, EdgeComposeError, FileDamaged
from edgecompose.generation.messages import conversation, query_text
from edgecompose.request import Answer
from edgecompose.serialize import composition_json
from edgecompose.server import protocol, responses
from edgecompose.server.config import ServerSettings
from edgecompose.server.metrics import Metrics
from edgecompose.server.protocol import ApiCall
from edgecompose.server.responses import Json

_PAGE = Path(__file__).with_name("templates")
_ASSETS = {
    "/": ("chat.html", "text/html"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/chat.css": ("chat.css", "text/css"),
}
#: What a page of ours may do: talk to its own server, and nothing else.
_PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
#: Paths that are served without a key: the page asks for it, and a monitor wants to know that the server lives.
_OPEN = frozenset((*_ASSETS, "/health"))


def create_app(
    composer: Composer, settings: ServerSettings | None = None, *, ready: Callable[[], None] = lambda: None
) -> Starlette:
    """The ASGI application of one bundle; it does not close the composer.

    Args:
        ready: called when the models are loaded.
    """
    settings = settings or ServerSettings()
    service = _Service(composer, settings, ready)
    posts: dict[str, Callable[[HttpRequest], Awaitable[Response]]] = {
        "/v1/chat/completions": service.chat,
        "/v1/completions": service.complete,
        "/v1/embeddings": service.embed,
        "/v1/compose": service.compose,
    }
    gets: dict[str, Callable[[HttpRequest], Awaitable[Response]]] = {
        "/v1/models": service.models,
        "/v1/models/{name:path}": service.model,
        "/health": service.health,
        "/metrics": service.metrics_text,
    }
    routes = [Route(path, work, methods=["POST"]) for path, work in posts.items()]
    routes += [Route(path, work, methods=["GET"]) for path, work in gets.items()]
    routes += [Route(path, _asset, methods=["GET"]) for path in _ASSETS]
    app = Starlette(
        routes=routes,
        lifespan=service.lifespan,
        exception_handlers={EdgeComposeError: _refuse, ClientDisconnect: _gone, 404: _nothing, 405: _nothing},
    )
    app.add_middleware(_Gate, settings=settings, metrics=service.metrics)
    return app


class _Service:
    """The endpoints, and the one queue that they share."""

    def __init__(self, composer: Composer, settings: ServerSettings, ready: Callable[[], None]) -> None:
        self._composer, self._settings, self._ready = composer, settings, ready
        self._aio = AsyncComposer(composer, workers=settings.workers)
        self._turn = asyncio.Semaphore(settings.workers)
        self._inside = 0
        self.metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Open everything before the first request, let go of the threads after the last."""
        async with self._aio:
            await self._aio.call(self._composer.warm_up)
            self._ready()
            yield

    @contextlib.asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """A turn to compute; refused at once where too many wait already."""
        if self._inside >= self._settings.workers + self._settings.queue:
            raise ApiError(
                f"{self._inside} requests are being answered or wait; come again", code="queue_full", status=429
            )
        self._inside += 1
        self.metrics.waiting.inc()
        try:
            async with self._turn:
                yield
        finally:
            self._inside -= 1
            self.metrics.waiting.dec()

    async def chat(self, http: HttpRequest) -> Response:
        """/v1/chat/completions: the answer to a conversation."""
        return await self._answer(await self._parse("chat", http), http)

    async def complete(self, http: HttpRequest) -> Response:
        """/v1/completions: the answer to each of some prompts, which are sent as they are."""
        return await self._answer(await self._parse("text", http), http)

    async def embed(self, http: HttpRequest) -> Response:
        """/v1/embeddings: the vectors that the bundle's encoder gives texts."""
        texts, packed = protocol.parse_inputs(await _body(http, self._settings.body_bytes))
        async with self._admitted():
            embedded = [await self._aio.call(functools.partial(self._composer.embed, text)) for text in texts]
        data = [
            {"object": "embedding", "index": i, "embedding": _packed(v) if packed else v.tolist()}
            for i, (v, _) in enumerate(embedded)
        ]
        count = sum(tokens for _, tokens in embedded)
        source = self._composer.bundle.manifest.embedder.source
        return JSONResponse(
            {"object": "list", "data": data, "model": source, "usage": {"prompt_tokens": count, "total_tokens": count}}
        )

    async def compose(self, http: HttpRequest) -> Response:
        """/v1/compose: the blend that a chat call would be answered with."""
        call = await self._parse("chat", http)
        async with self._admitted():
            composition = await self._aio.compose(call.prompts[0], call.request)
        query = query_text(conversation(call.prompts[0]), call.request.route_by)
        return JSONResponse({"object": "composition", "prompt": query, **composition_json(composition)})

    async def models(self, http: HttpRequest) -> Response:
        """/v1/models: what `model` may be."""
        return JSONResponse({"object": "list", "data": [_model(name) for name in protocol.model_names(self._composer)]})

    async def model(self, http: HttpRequest) -> Response:
        """/v1/models/NAME: one of them."""
        name = http.path_params["name"]
        if name not in protocol.model_names(self._composer):
            raise protocol.unknown_model(name)
        return JSONResponse(_model(name))

    async def health(self, http: HttpRequest) -> Response:
        """/health: that the server lives, the bundle, the device; wants no key."""
        manifest = self._composer.bundle.manifest
        return JSONResponse({"status": "ok", "bundle": manifest.name, "device": self._composer.device.kind})

    async def metrics_text(self, http: HttpRequest) -> Response:
        """/metrics: requests, tokens and time of each stage, for Prometheus."""
        text, kind = self.metrics.text()
        return Response(text, media_type=kind)

    async def _parse(self, kind: protocol.Kind, http: HttpRequest) -> ApiCall:
        body = await _body(http, self._settings.body_bytes)
        return protocol.call_of(self._composer, kind, body, max_tokens=self._settings.max_tokens)

    async def _answer(self, call: ApiCall, http: HttpRequest) -> Response:
        name = responses.new_id(call.kind)
        if call.stream:
            pieces = self._streamed(call, name)
            first = await anext(pieces)  # what is refused is refused with a status, before the stream begins
            return StreamingResponse(_events(first, pieces), media_type="text/event-stream", headers=_FRESH)
        work = asyncio.create_task(self._answers(call))
        gone = asyncio.create_task(_disconnected(http))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return JSONResponse(responses.response(call, work.result(), name))
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _answers(self, call: ApiCall) -> list[Answer]:
        async with self._admitted():
            answers = [await self._aio.run(prompt, call.request) for prompt in call.prompts]
        self._count(answers)
        return answers

    async def _streamed(self, call: ApiCall, name: str) -> AsyncIterator[Json]:
        answers: list[Answer] = []
        async with self._admitted():
            for index, prompt in enumerate(call.prompts):
                async with await self._aio.generate(prompt, call.request) as generation:
                    first = True
                    async for piece in generation:
                        yield responses.chunk(call, name, piece, index=index, first=first)
                        first = False
                    answers.append(generation.answer)
                    yield responses.last_chunk(call, name, generation.answer, index=index)
        self._count(answers)
        if call.usage:
            yield responses.usage_chunk(call, name, answers)

    def _count(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self.metrics.answered(answer)


class _Gate:
    """Refuses whatever does not come from where it may, before anything reads it; counts what passes by."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(HttpRequest(scope))
        try:
            await (self._app if refusal is None else refusal)(scope, receive, noting)
        finally:
            self._metrics.requested(scope["path"], status, time.perf_counter() - start)

    def _refusal(self, http: HttpRequest) -> Response | None:
        headers = http.headers
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() not in self._settings.hosts:
            return _error(ApiError(f"this server is not called {name!r:.80}", code="unknown_host", status=421))
        origin = headers.get("origin")
        own = f"{http.url.scheme}://{host}"
        foreign = origin is not None and origin != own and origin not in self._settings.origins
        if foreign or (origin is None and headers.get("sec-fetch-site", "none") not in ("none", "same-origin")):
            return _error(ApiError("pages of other sites may not use this server", code="foreign_origin", status=403))
        if self._settings.key is not None and http.url.path not in _OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, self._settings.key.encode()):
                error = ApiError("the key is missing or wrong; send it as a bearer token", code="wrong_key", status=401)
                return _error(error, {"WWW-Authenticate": "Bearer"})
        return None


_FRESH = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


async def _body(http: HttpRequest, limit: int) -> object:
    """The parsed body of a request.

    Raises:
        ApiError: it is no JSON, not said to be, or larger than `limit` bytes.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of another site can be sent without asking; JSON cannot
        raise ApiError(f"content-type is {kind!r:.80}; expected application/json", status=415)
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > limit:
            raise ApiError(f"the request is larger than {limit} bytes; send less", code="too_large", status=413)
        parts.append(part)
    try:
        found: object = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the request is not JSON: {error}") from error
    return found


async def _events(first: Json, rest: AsyncIterator[Json]) -> AsyncIterator[bytes]:
    """Server-sent events; an error after the first of them is the last."""
    yield _event(first)
    try:
        async for found in rest:
            yield _event(found)
    except EdgeComposeError as error:
        yield _event(responses.error_json(error))
    yield b"data: [DONE]\n\n"


def _event(found: Json) -> bytes:
    return b"data: " + json.dumps(found, ensure_ascii=False).encode() + b"\n\n"


async def _disconnected(http: HttpRequest) -> None:
    while not await http.is_disconnected():
        await asyncio.sleep(0.05)


async def _asset(http: HttpRequest) -> Response:
    """/: the page to try it on, and its files; wants no key."""
    name, kind = _ASSETS[http.url.path]
    headers = {**_FRESH, "Content-Security-Policy": _PAGE_POLICY, "Referrer-Policy": "no-referrer"}
    return Response((_PAGE / name).read_bytes(), media_type=kind, headers=headers)


async def _refuse(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, EdgeComposeError)
    return _error(error)


async def _gone(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _nothing(http: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _error(ApiError(f"{http.method} {http.url.path} is nothing that this server does", status=status))


def _error(error: EdgeComposeError, headers: dict[str, str] | None = None) -> Response:
    status = error.status if isinstance(error, ApiError) else 400
    if isinstance(error, (FileDamaged, DeviceError)):
        status = 500
    retry = {"Retry-After": "1"} if status == 429 else {}
    return JSONResponse(responses.error_json(error), status, headers={**retry, **(headers or {})})


def _model(name: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "edgecompose"}


def _packed(vector: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode("ascii")
