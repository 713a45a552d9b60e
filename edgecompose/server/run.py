"""Runs the HTTP server; its packages, an extra, are imported when it starts."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections.abc import Callable

from edgecompose.composer import Composer
from edgecompose.errors import EdgeComposeError
from edgecompose.server.config import KEY_VARIABLE, LOOPBACK, ServerSettings

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
#: Seconds that answers may take to end after Ctrl-C.
_GRACE = 5


def run_server(
    composer: Composer, settings: ServerSettings, *, host: str, port: int, ready: Callable[[str], None]
) -> None:
    """Serve until a signal ends it.

    Args:
        host: an address; one that other machines can reach needs a key.
        port: 0 takes one that is free.
        ready: called with the address once it can be used.

    Raises:
        EdgeComposeError: the extra is not installed, a key is missing, or the address cannot be used.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EdgeComposeError(f"the server needs {', '.join(missing)}; run: pip install 'edgecompose[server]'")
    if f"[{host}]" not in LOOPBACK and host not in LOOPBACK and settings.key is None:
        raise EdgeComposeError(
            f"{host} can be reached from other machines and no key is set; "
            f"give --api-key-file or {KEY_VARIABLE}, or listen at {LOOPBACK[0]}"
        )
    import uvicorn

    from edgecompose.server.app import create_app

    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}/"
    config = uvicorn.Config(
        create_app(composer, settings, ready=lambda: ready(url)),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=_GRACE,
    )
    with listening, contextlib.suppress(KeyboardInterrupt):  # which the server raises again once it has ended
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    try:
        if os.name != "nt":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()  # before `ready`, so that callers can connect at once
    except OSError as error:
        listening.close()
        raise EdgeComposeError(f"cannot listen at {host} port {port}: {error}; give another --port") from error
    return listening
