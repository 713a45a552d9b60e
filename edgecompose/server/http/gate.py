"""Checks the target, Host, Origin and key of every HTTP request before anything else reads it.

A page of another site, open in the user's browser, gets nothing. Whatever fails behind the gate is answered in JSON.
"""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edgecompose.errors import ApiError, EdgeComposeError
from edgecompose.server import responses
from edgecompose.server.config import ServerSettings
from edgecompose.server.http.metrics import Metrics
from edgecompose.server.json_text import to_bytes

_ABSOLUTE = re.compile(r"https?://([^/?#]*)(/.*)?", re.IGNORECASE | re.DOTALL)
#: Seconds that a browser may remember what a preflight, of the Fetch standard's CORS protocol, was told.
_REMEMBER = 600
_METHODS = "GET, POST, OPTIONS"
#: Headers of ours that pages may read beside those that they always may.
_EXPOSED = "Retry-After, WWW-Authenticate"
#: On every answer, unless it says otherwise.
_ALWAYS = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))
#: Statuses after which the rest of the request is of no use, so that the connection is closed.
_CLOSING = (408, 413, 503)
#: Code of a request that two parts of a chain of proxies could divide differently.
_TWO_LENGTHS = "two_lengths"


class Gate:
    """ASGI middleware that refuses requests from elsewhere before their body is read, and counts all requests.

    Args:
        methods: gives the methods of a path, for `Allow`.
        open_paths: paths that are served without a key.
        explain: makes an error of ours of anything that was raised.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: ServerSettings,
        metrics: Metrics,
        methods: Callable[[str], str],
        open_paths: Collection[str],
        explain: Callable[[Exception], EdgeComposeError],
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._methods, self._open, self._explain = methods, open_paths, explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        authority, path = _target(scope["path"])
        scope = {**scope, "path": path}
        http = HttpRequest(scope)
        status, start = 0, time.perf_counter()

        async def send_and_note(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": self._with_headers(http, message.get("headers", []))}
            try:
                await send(message)
            except Exception as error:  # the connection is no longer in a state to send anything
                raise ClientDisconnect from error

        try:
            try:
                response = self._answer(http, authority)
                await (response or self._app)(scope, receive, send_and_note)
            except ClientDisconnect:
                status = status or 499
            except Exception as error:
                if status:
                    raise
                await error_response(self._explain(error))(scope, receive, send_and_note)
        except Exception as error:
            self._explain(error)  # which logs it; the answer has begun, so that it can only be cut
        finally:
            self._metrics.requested(path, status or 499, time.perf_counter() - start)

    def _answer(self, http: HttpRequest, authority: str | None) -> Response | None:
        """The answer to a request that goes no further.

        Raises:
            ApiError: the request is refused.
        """
        headers = http.headers
        for host in (headers.get("host", ""), *(() if authority is None else (authority,))):
            self._check_host(host)
        if "transfer-encoding" in headers and "content-length" in headers:
            raise ApiError("both Content-Length and Transfer-Encoding are given; send one", code=_TWO_LENGTHS)
        check_origin(headers, f"{http.url.scheme}://{headers.get('host', '')}", self._settings.origins)
        if http.method == "OPTIONS":
            return preflight(headers, self._methods(http.scope["path"]))
        if self._settings.key is not None and http.scope["path"] not in self._open:
            self._check_key(headers.get("authorization", ""), self._settings.key)
        return None

    def _check_host(self, host: str) -> None:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() not in self._settings.hosts:
            message = f"this server is not called {name!r:.80}; start it with --allow-host and that name, if it is"
            raise ApiError(message, code="unknown_host", status=421)

    def _check_key(self, authorization: str, key: str) -> None:
        scheme, _, value = authorization.strip().partition(" ")
        right = hmac.compare_digest(value.strip().encode(), key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                "the key is missing or wrong; send the header 'Authorization: Bearer KEY'", code="wrong_key", status=401
            )

    def _with_headers(self, http: HttpRequest, headers: Any) -> list[tuple[bytes, bytes]]:
        present = {name.lower() for name, _ in headers}
        added = [(name, value) for name, value in _ALWAYS if name not in present]
        return [*headers, *added, *origin_headers(http.headers, self._settings.origins)]


def check_origin(headers: Headers, own: str, origins: Collection[str]) -> None:
    """Refuse a page of a site that is not admitted.

    Args:
        own: the origin of the server's own page.
        origins: of other pages that are admitted.

    Raises:
        ApiError: the request comes from a page of another site.
    """
    origin = headers.get("origin")
    if origin is None:
        # browsers leave the origin out where a page merely embeds or follows something
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return
        raise _foreign("another site")
    if origin != own and origin not in origins:
        raise _foreign(origin)


def origin_headers(headers: Headers, origins: Collection[str]) -> list[tuple[bytes, bytes]]:
    """What every answer to a request says about its origin."""
    if not origins:
        return []
    origin = headers.get("origin")
    said = [(b"vary", b"Origin")]
    if origin in origins and origin is not None:
        said.append((b"access-control-allow-origin", origin.encode("latin-1")))
        said.append((b"access-control-expose-headers", _EXPOSED.encode()))
    return said


def preflight(headers: Headers, allowed: str) -> Response:
    """The answer to an OPTIONS request, which carries no key: what the page may send.

    Args:
        allowed: methods that the path has.
    """
    response = Response(status_code=204, headers={"Allow": allowed})
    if "access-control-request-method" in headers:
        response.headers["Access-Control-Allow-Methods"] = _METHODS
        response.headers["Access-Control-Max-Age"] = str(_REMEMBER)
        response.headers["Vary"] = "Access-Control-Request-Headers"
        if "access-control-request-headers" in headers:
            response.headers["Access-Control-Allow-Headers"] = headers["access-control-request-headers"]
        if headers.get("access-control-request-private-network") == "true":
            response.headers["Access-Control-Allow-Private-Network"] = "true"
    return response


def _foreign(origin: str) -> ApiError:
    return ApiError(
        f"pages of {origin:.200} may not use this server; start it with --allow-origin and the page's origin",
        code="foreign_origin",
        status=403,
    )


def error_response(error: EdgeComposeError) -> Response:
    """An error in the API's form, with its status."""
    status = responses.status_of(error)
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in _CLOSING or getattr(error, "code", None) == _TWO_LENGTHS:
        headers["Connection"] = "close"
    return json_response(responses.error_json(error), status, headers)


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response that is JSON, whatever is in the value."""
    return Response(to_bytes(value), status, headers, media_type="application/json")


def _target(path: str) -> tuple[str | None, str]:
    """The authority of a target in absolute form, as clients behind a proxy send it, and the path without extra '/'."""
    absolute = _ABSOLUTE.fullmatch(path)
    authority, path = (None, path) if absolute is None else (absolute[1], absolute[2] or "/")
    return authority, re.sub("/{2,}", "/", path).rstrip("/") or "/"
