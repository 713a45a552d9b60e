"""Reads the body of a request, of bounded size and within a bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest

from edgecompose.errors import ApiError
from edgecompose.server import json_text

#: Larger texts are parsed in a thread, so that other requests are answered meanwhile.
_LARGE = 32 << 10
#: Of a body that is too large, so many bytes are read and dropped: clients that send all of it before they read the
#: answer get the answer.
_DROPPED = 32 << 20


async def read_body(http: HttpRequest, limit: int, seconds: float) -> Any:
    """The parsed body of a request.

    Raises:
        ApiError: it is no JSON, not said to be, larger than `limit` bytes, or not complete after `seconds`.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of another site can be sent without asking; JSON cannot
        raise ApiError(f"content-type is {kind!r:.80}; expected application/json", status=415)
    parts = http.stream()
    try:
        async with asyncio.timeout(seconds):
            data = await _read(http, parts, limit)
    except TimeoutError as error:
        raise ApiError(
            f"the body was not complete after {seconds:g} s; send it at once", code="timeout", status=408
        ) from error
    if len(data) < _LARGE:
        return json_text.parse(data)
    return await asyncio.to_thread(json_text.parse, data)


async def _read(http: HttpRequest, parts: AsyncIterator[bytes], limit: int) -> bytes:
    announced = http.headers.get("content-length", "")
    size, kept = 0, bytearray()
    too_large = announced.isdecimal() and int(announced[:20]) > limit
    if not (too_large and "expect" in http.headers):  # such a client waits for leave to send its body
        async for part in parts:
            size += len(part)
            too_large = too_large or size > limit
            if size > _DROPPED:
                break
            if not too_large:
                kept += part
    if too_large:
        raise ApiError(f"the request is larger than {limit} bytes; send less", code="too_large", status=413)
    return bytes(kept)
