"""Checks the Host, Origin and key of every HTTP request before anything else reads it.

A page of another site, open in the user's browser, gets nothing.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edgecompose.errors import ApiError, DeviceError, EdgeComposeError, FileDamaged
from edgecompose.server import responses
from edgecompose.server.config import ServerSettings
from edgecompose.server.metrics import Metrics


class Gate:
    """ASGI middleware that refuses requests from elsewhere before their body is read, and counts all requests.

    Args:
        open_paths: paths that are served without a key.
    """

    def __init__(
        self, app: ASGIApp, *, settings: ServerSettings, metrics: Metrics, open_paths: Collection[str]
    ) -> None:
        self._app, self._settings, self._metrics, self._open = app, settings, metrics, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def send_and_note(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(HttpRequest(scope))
        try:
            await (self._app if refusal is None else refusal)(scope, receive, send_and_note)
        finally:
            self._metrics.requested(scope["path"], status, time.perf_counter() - start)

    def _refusal(self, http: HttpRequest) -> Response | None:
        headers = http.headers
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() not in self._settings.hosts:
            return error_response(ApiError(f"this server is not called {name!r:.80}", code="unknown_host", status=421))
        origin = headers.get("origin")
        own = f"{http.url.scheme}://{host}"
        foreign = origin is not None and origin != own and origin not in self._settings.origins
        if foreign or (origin is None and headers.get("sec-fetch-site", "none") not in ("none", "same-origin")):
            return error_response(
                ApiError("pages of other sites may not use this server", code="foreign_origin", status=403)
            )
        if self._settings.key is not None and http.url.path not in self._open:
            key = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(key, self._settings.key.encode()):
                error = ApiError("the key is missing or wrong; send it as a bearer token", code="wrong_key", status=401)
                return error_response(error, {"WWW-Authenticate": "Bearer"})
        return None


def error_response(error: EdgeComposeError, headers: dict[str, str] | None = None) -> Response:
    """An error in the API's form, with its status."""
    status = error.status if isinstance(error, ApiError) else 400
    if isinstance(error, (FileDamaged, DeviceError)):
        status = 500
    retry = {"Retry-After": "1"} if status == 429 else {}
    return JSONResponse(responses.error_json(error), status, headers={**retry, **(headers or {})})
