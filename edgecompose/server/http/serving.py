"""uvicorn's server with our connections, and an end within the grace."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Generator
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette

from edgecompose.server.config import ServerSettings
from edgecompose.server.http.connection import Connection

#: Seconds that clients get to read the last bytes of their answers when the server ends.
_LAST_BYTES = 1.0


class Server(uvicorn.Server):
    """A server of an application that `create_app` made; whoever runs it takes the signals, and calls `end`."""

    def __init__(self, app: Starlette, settings: ServerSettings) -> None:
        self._service, self._settings = app.state.service, settings
        config = uvicorn.Config(
            app,
            http=cast(Any, functools.partial(Connection, settings=settings)),
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",  # what matters is logged by the application, in one line and without a traceback
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=cast(int, settings.idle_seconds),
            timeout_graceful_shutdown=cast(int, settings.grace_seconds),
        )
        super().__init__(config)
        self._hurry = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve_until_ended(self, listening: socket.socket) -> None:
        """Serve at a socket until `end` was called.

        Raises:
            EdgeComposeError: the models cannot be loaded.
        """
        try:
            self.run(sockets=[listening])
        except SystemExit:  # how uvicorn says that the application did not start
            if self._service.failure is not None:
                raise self._service.failure from None
            raise

    def end(self) -> None:
        """End after the answers in progress, or, where that was said before, at once; from any thread or a signal."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._hurry.set)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to whoever runs the server."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the application and listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, end the answers in progress, and close."""
        for server in self.servers:
            server.close()
        for listening in sockets or []:
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._service.answers.end(self._hurry)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_BYTES):
                while self.server_state.connections:
                    await asyncio.sleep(0.01)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_BYTES)
        await self.lifespan.shutdown()
