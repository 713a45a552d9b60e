"""One connection of a client: how long it may take for what, and what is answered when it breaks the protocol."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgecompose.errors import ApiError
from edgecompose.server import responses
from edgecompose.server.config import ServerSettings
from edgecompose.server.http.events import EVENTS
from edgecompose.server.json_text import to_bytes

_LOG = logging.getLogger(__name__)
#: Bytes of an answer that are kept for a client that does not read; then the answer waits.
_UNSENT_BYTES = 64 << 10
#: Seconds after the end of a client's sending at which it is tried whether it still listens: one that has closed its
#: end altogether resets the connection at the first try, which the second notices.
_TRIES = (0.05, 0.2, 1.0, 5.0)


class Connection(H11Protocol):
    """uvicorn's connection with bounds: for the header, for a client that does not read, and for how many there are.

    A client that has ended its sending, but still listens, gets its answer.
    """

    def __init__(self, *arguments: Any, settings: ServerSettings, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._settings = settings
        self._header: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._tries: list[asyncio.TimerHandle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(_UNSENT_BYTES)
        if len(self.connections) > self._settings.connections:
            self._refuse(
                ApiError(f"{len(self.connections)} connections are open; come again", code="too_many", status=503)
            )
            return
        self._header = self.loop.call_later(self._settings.header_seconds, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget all timers; uvicorn tells the request in progress."""
        for timer in (self._header, self._unread, *self._tries):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        try:
            super().data_received(data)
        except Exception as error:  # of the protocol's state machine, which is of no use any more
            _LOG.debug("a connection ended", exc_info=error)
            self._end()
            return
        if self._answering:
            if self._header is not None:
                self._header.cancel()
                self._header = None
        elif self._header is None and not self.transport.is_closing():
            self._header = self.loop.call_later(self._settings.header_seconds, self._end)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: end, unless a whole request is being answered."""
        if not self._answering or self.cycle.more_body or self.scope["http_version"] == "1.0":
            return False
        self.cycle.keep_alive = False
        self._tries = [self.loop.call_later(seconds, self._try_to_send) for seconds in _TRIES]
        return True

    def pause_writing(self) -> None:
        """The client does not read; it has some time to go on."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self._settings.write_seconds, self._end)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def on_response_complete(self) -> None:
        """Wait for the next request; an answer that is not read keeps its connection no longer than others."""
        super().on_response_complete()
        if self.transport.is_closing() and self._unread is None:
            self._unread = self.loop.call_later(self._settings.write_seconds, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """No request came for as long as a connection may be idle."""
        self._end()

    def shutdown(self) -> None:
        """The server ends: close when the answer in progress, if any, is complete."""
        if self._answering:
            self.cycle.keep_alive = False
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        if self._answering or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self._end()
            return
        self._refuse(ApiError(f"{msg.rstrip('.')[:1].lower()}{msg.rstrip('.')[1:]}", code="invalid_http"))

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ApiError) -> None:
        """Answer without a request, and close."""
        body = to_bytes(responses.error_json(error))
        status = responses.status_of(error)
        lines = (
            f"HTTP/1.1 {status} {'Service Unavailable' if status == 503 else 'Bad Request'}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Connection: close",
        )
        self.transport.write("\r\n".join((*lines, "", "")).encode() + body)
        self.transport.close()
        self._unread = self.loop.call_later(self._settings.write_seconds, self.transport.abort)

    def _end(self) -> None:
        """End the connection, whatever is unsent."""
        if self._answering or self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _try_to_send(self) -> None:
        """Write what changes nothing, so that the system notices a client that has gone altogether."""
        if not self._answering or self.transport.is_closing():
            return
        if not self.cycle.response_started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif self.scope["state"].get(EVENTS) and self.conn.our_state is h11.SEND_BODY:
            self.transport.write(self.conn.send(h11.Data(data=b":\n\n")) or b"")  # an empty comment

    def _should_upgrade(self) -> bool:
        return False  # an offer of another protocol is not taken up
