"""Serves a bundle over HTTP on this machine: the endpoints of the table, models, health, metrics, and a chat page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgecompose.composer import Composer
from edgecompose.errors import ApiError
from edgecompose.server import protocol
from edgecompose.server.config import ServerSettings
from edgecompose.server.endpoints import BY_PATH
from edgecompose.server.http.answers import Answers
from edgecompose.server.http.body import read_body
from edgecompose.server.http.events import EventStream, watched
from edgecompose.server.http.gate import Gate, error_response, json_response
from edgecompose.server.http.metrics import Metrics
from edgecompose.server.http.turns import Work
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
    service = Service(composer, settings, ready)
    gets: dict[str, Callable[[HttpRequest], Awaitable[Response]]] = {
        "/v1/models": service.models,
        "/v1/models/{name:path}": service.model,
        "/health": service.health,
        "/metrics": service.metrics_text,
    }
    routes = [Route(path, service.post, methods=["POST"]) for path in BY_PATH]
    routes += [Route(path, get, methods=["GET"]) for path, get in gets.items()]
    routes += [Route(path, _asset, methods=["GET"]) for path in _ASSETS]
    app = Starlette(routes=routes, lifespan=service.lifespan, exception_handlers={404: _nothing, 405: _nothing})
    app.state.service = service
    app.add_middleware(
        Gate,
        settings=settings,
        metrics=service.metrics,
        methods=_methods_of,
        open_paths=_OPEN,
        explain=service.answers.explain,
    )
    return app


class Service:
    """The endpoints of a server."""

    def __init__(self, composer: Composer, settings: ServerSettings, ready: Callable[[], None]) -> None:
        self._composer, self._settings, self._ready = composer, settings, ready
        self.metrics = Metrics((*BY_PATH, *_COUNTED))
        self.answers = Answers(composer, settings, self.metrics)
        self.failure: Exception | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Load the models before the first request, and end the threads after the last."""
        async with self.answers:
            try:
                await self.answers.load()
            except Exception as error:
                self.failure = error  # for the caller of the server, which is told only that it did not start
                raise
            self._ready()
            yield

    async def post(self, http: HttpRequest) -> Response:
        """An endpoint of the table."""

        async def read(work: Work[object]) -> None:
            await work.put((await read_body(http, self._settings.body_bytes, self._settings.body_seconds),))

        reading = self.answers.begin(read)
        try:
            (body,) = cast(tuple[object], await reading.next())
        finally:
            reading.end()
        work, stream = self.answers.answer(BY_PATH[http.scope["path"]], body)
        if stream:
            return await self._stream(work)
        return json_response(await _only_value(work, http))

    async def models(self, http: HttpRequest) -> Response:
        """/v1/models: the values of `model`."""
        names = [*protocol.model_names(self._composer), *self._settings.aliases]
        return json_response({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, http: HttpRequest) -> Response:
        """/v1/models/NAME: one of them."""
        name = http.path_params["name"]
        known = [*protocol.model_names(self._composer), *self._settings.aliases]
        if name not in known:
            raise protocol.unknown_model(name, known)
        return json_response(self._model(name))

    async def health(self, http: HttpRequest) -> Response:
        """/health: whether the server runs, its bundle and device, whether the bundle has changed; needs no key."""
        bundle = self._composer.bundle
        return json_response(
            {
                "status": "ending" if self.answers.ending else "ok",
                "bundle": bundle.manifest.name,
                "device": self._composer.device.kind,
                "bundle_changed": bundle.changed,
            }
        )

    async def metrics_text(self, http: HttpRequest) -> Response:
        """/metrics: requests, tokens and time of each stage, for Prometheus."""
        text, kind = self.metrics.text()
        return Response(text, media_type=kind)

    async def _stream(self, work: Work[Json]) -> Response:
        """An answer in events; what is refused at once is refused with a status."""
        first = work.coming()
        try:
            await asyncio.wait({first}, timeout=self._settings.first_seconds)
            if first.done():
                first.result()
        except BaseException:
            first.cancel()
            work.end()
            raise
        return EventStream(work, first, explain=self.answers.explain, seconds=self._settings.comment_seconds)

    def _model(self, name: str) -> Json:
        return {"id": name, "object": "model", "created": self.answers.created, "owned_by": "edgecompose"}


async def _only_value(work: Work[Json], http: HttpRequest) -> Json:
    """The one value of a piece of work; a client that disconnects ends it."""
    coming = work.coming()
    try:
        async with watched(http.receive) as gone:
            await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise ClientDisconnect
        value = coming.result()
        assert value is not None
        return value
    finally:
        coming.cancel()
        work.end()


async def _asset(http: HttpRequest) -> Response:
    """/: the chat page and its files; needs no key."""
    name, kind = _ASSETS[http.scope["path"]]
    headers = {"Content-Security-Policy": _PAGE_POLICY, "Referrer-Policy": "no-referrer"}
    return Response((_PAGE / name).read_bytes(), media_type=kind, headers=headers)


async def _nothing(http: HttpRequest, error: Exception) -> Response:
    """No such path, or no such method of it."""
    status = getattr(error, "status_code", 404)
    path = http.scope["path"]
    hint = f"it has {_methods_of(path)}" if status == 405 else _hint(path, str(http.base_url))
    refusal = ApiError(f"{http.method} {path!r:.200} is nothing that this server does; {hint}", status=status)
    response = error_response(refusal)
    if status == 405:
        response.headers["Allow"] = _methods_of(path)
    return response


def _hint(path: str, base_url: str) -> str:
    """What somebody who called a path that is not there probably wants."""
    api = f"this is an OpenAI API: give your client the base URL {base_url}v1"
    if path.startswith("/v1/responses"):
        return "use /v1/chat/completions (in the AI SDK: .chat(model); in openai-agents: OpenAIChatCompletionsModel)"
    if path.startswith("/v1/v1"):
        return f"/v1 is in the path twice; {api}"
    if f"/v1{path}" in BY_PATH or path.startswith("/models"):
        return f"/v1 is missing in the path; {api}"
    return f"{api}, not Ollama's" if path.startswith("/api/") else api


def _methods_of(path: str) -> str:
    return "POST, OPTIONS" if path in BY_PATH else "GET, HEAD, OPTIONS"
