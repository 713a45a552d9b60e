"""Serves a bundle over HTTP on this machine: the endpoints of the table, models, health, metrics, and a chat page."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from edgecompose.aio import AsyncComposer
from edgecompose.composer import Composer
from edgecompose.errors import ApiError, EdgeComposeError
from edgecompose.request import Answer
from edgecompose.server import protocol, responses
from edgecompose.server.config import ServerSettings
from edgecompose.server.endpoints import BY_PATH
from edgecompose.server.gate import Gate, error_response
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
#: Paths that are counted by name beside those of the table.
_COUNTED = ("/v1/models", "/health", "/metrics", "/")
#: Paths that are served without a key: the page asks for the key, and monitors read /health.
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
    gets: dict[str, Callable[[HttpRequest], Awaitable[Response]]] = {
        "/v1/models": service.models,
        "/v1/models/{name:path}": service.model,
        "/health": service.health,
        "/metrics": service.metrics_text,
    }
    routes = [Route(path, service.post, methods=["POST"]) for path in BY_PATH]
    routes += [Route(path, get, methods=["GET"]) for path, get in gets.items()]
    routes += [Route(path, _asset, methods=["GET"]) for path in _ASSETS]
    app = Starlette(
        routes=routes,
        lifespan=service.lifespan,
        exception_handlers={EdgeComposeError: _refuse, ClientDisconnect: _gone, 404: _nothing, 405: _nothing},
    )
    app.add_middleware(Gate, settings=settings, metrics=service.metrics, open_paths=_OPEN)
    return app


class _Service:
    """The endpoints, and the one queue that they share."""

    def __init__(self, composer: Composer, settings: ServerSettings, ready: Callable[[], None]) -> None:
        self._composer, self._settings, self._ready = composer, settings, ready
        self._aio = AsyncComposer(composer, workers=settings.workers)
        self._turn = asyncio.Semaphore(settings.workers)
        self._inside = 0
        self.metrics = Metrics((*BY_PATH, *_COUNTED))

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Load the models before the first request, and end the threads after the last."""
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

    async def post(self, http: HttpRequest) -> Response:
        """An endpoint of the table."""
        action = BY_PATH[http.url.path].action
        body = await _body(http, self._settings.body_bytes)
        if isinstance(action, str):
            call = protocol.call_of(self._composer, action, body, max_tokens=self._settings.max_tokens)
            return await self._answer(call, http)
        compute = action(self._composer, body, self._settings.max_tokens)
        async with self._admitted():
            return JSONResponse(await self._aio.call(compute))

    async def models(self, http: HttpRequest) -> Response:
        """/v1/models: the values of `model`."""
        return JSONResponse({"object": "list", "data": [_model(name) for name in protocol.model_names(self._composer)]})

    async def model(self, http: HttpRequest) -> Response:
        """/v1/models/NAME: one of them."""
        name = http.path_params["name"]
        if name not in protocol.model_names(self._composer):
            raise protocol.unknown_model(name)
        return JSONResponse(_model(name))

    async def health(self, http: HttpRequest) -> Response:
        """/health: whether the server runs, its bundle and device; needs no key."""
        manifest = self._composer.bundle.manifest
        return JSONResponse({"status": "ok", "bundle": manifest.name, "device": self._composer.device.kind})

    async def metrics_text(self, http: HttpRequest) -> Response:
        """/metrics: requests, tokens and time of each stage, for Prometheus."""
        text, kind = self.metrics.text()
        return Response(text, media_type=kind)

    async def _answer(self, call: ApiCall, http: HttpRequest) -> Response:
        name = responses.new_id(call.kind)
        if call.stream:
            chunks = self._streamed(call, name)
            first = await anext(chunks)  # what is refused is refused with a status, before the stream begins
            return StreamingResponse(_events(first, chunks), media_type="text/event-stream", headers=_FRESH)
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
                    async for text in generation:
                        yield responses.chunk(call, name, text, index=index, first=first)
                        first = False
                    answers.append(generation.answer)
                    yield responses.last_chunk(call, name, generation.answer, index=index)
        self._count(answers)
        if call.usage:
            yield responses.usage_chunk(call, name, answers)

    def _count(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self.metrics.answered(answer)


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
        body: object = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the request is not JSON: {error}") from error
    return body


async def _events(first: Json, rest: AsyncIterator[Json]) -> AsyncIterator[bytes]:
    """Server-sent events; an error after the first of them is the last."""
    yield _event(first)
    try:
        async for event in rest:
            yield _event(event)
    except EdgeComposeError as error:
        yield _event(responses.error_json(error))
    yield b"data: [DONE]\n\n"


def _event(event: Json) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"


async def _disconnected(http: HttpRequest) -> None:
    while not await http.is_disconnected():
        await asyncio.sleep(0.05)


async def _asset(http: HttpRequest) -> Response:
    """/: the chat page and its files; needs no key."""
    name, kind = _ASSETS[http.url.path]
    headers = {**_FRESH, "Content-Security-Policy": _PAGE_POLICY, "Referrer-Policy": "no-referrer"}
    return Response((_PAGE / name).read_bytes(), media_type=kind, headers=headers)


async def _refuse(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, EdgeComposeError)
    return error_response(error)


async def _gone(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # the client has disconnected


async def _nothing(http: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return error_response(ApiError(f"{http.method} {http.url.path} is nothing that this server does", status=status))


def _model(name: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "edgecompose"}
