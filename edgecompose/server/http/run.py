"""Runs the HTTP server until a signal ends it; its packages, an extra, are imported when it starts."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

from edgecompose.composer import Composer
from edgecompose.errors import EdgeComposeError
from edgecompose.server.config import KEY_VARIABLE, LOOPBACK, ServerSettings, bare_host, is_loopback

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
#: Bytes of an answer that the system keeps for a client that does not read, beside those of the connection.
_SEND_BUFFER = 64 << 10
#: Exit code of a program that a signal ended, less the signal.
_BY_SIGNAL = 128


def run_server(
    composer: Composer, settings: ServerSettings, *, host: str, port: int, ready: Callable[[str], None]
) -> int:
    """Serve until a signal ends it.

    Answers in progress end within the grace of the settings. A second signal shortens it, a third ends it. A process
    that is held by native code beyond its grace leaves from here, with a line on stderr.

    Args:
        host: an address; one that other machines can reach needs a key.
        port: 0 takes one that is free.
        ready: called with the address once it can be used.

    Returns:
        The exit code: 128 and the signal.

    Raises:
        EdgeComposeError: the extra is not installed, a key is missing, the address cannot be used, or the models cannot
            be loaded.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EdgeComposeError(f"the server needs {', '.join(missing)}; run: pip install 'edgecompose[server]'")
    host = bare_host(host)
    if not is_loopback(host) and settings.key is None:
        raise EdgeComposeError(
            f"{host} can be reached from other machines and no key is set; "
            f"give --api-key-file or {KEY_VARIABLE}, or listen at {LOOPBACK[0]}"
        )
    from edgecompose.server.http.app import create_app
    from edgecompose.server.http.serving import Server

    listening = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}/"
    with listening:
        server = Server(create_app(composer, settings, ready=lambda: ready(url)), settings)
        ending = Ending(server.end, settings.grace_seconds)
        with ending:
            server.serve_until_ended(listening)
    return _BY_SIGNAL + (ending.signal or signal.SIGTERM)


class Ending:
    """Takes the signals that end a program, while it is entered.

    Args:
        end: called at the first signal, and at the second.
        seconds: after the first signal, at which the process leaves if it is still there.
    """

    def __init__(self, end: Callable[[], None], seconds: float) -> None:
        self._end, self._seconds = end, seconds
        self.signal = 0
        self._count = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Ending:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *raised: object) -> None:
        if not self.signal:  # afterwards nothing but the exit is left, which another signal may not interrupt
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]  # what `signal.signal` returned

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.signal = self.signal or number
        if self._count == 1:
            timer = threading.Timer(self._seconds, self._leave)
            timer.daemon = True
            timer.start()
        elif self._count > 2:
            self._leave()
        self._end()

    def _leave(self) -> None:
        """End the process as it is."""
        os.write(2, f"edgecompose: not ended after {self._seconds:g} s, so it leaves what it was at\n".encode())
        os._exit(_BY_SIGNAL + self.signal)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        EdgeComposeError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small packets at once only where the protocol is named
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name != "nt":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # what is accepted inherits it
        listening.bind((host, port))
        listening.listen(1024)  # before `ready`, so that callers can connect at once
    except OSError as error:
        listening.close()
        raise EdgeComposeError(
            f"cannot listen at {host} port {port}: {error}; give another --host or --port"
        ) from error
    return listening
