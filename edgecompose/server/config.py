"""Settings of a server: host names, origins, key, and limits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecompose.errors import EdgeComposeError

#: Names of this machine that nothing outside of it can use.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
KEY_VARIABLE = "EDGECOMPOSE_API_KEY"
_ANYWHERE = ("0.0.0.0", "::")
_SHORTEST_KEY = 16


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of a server.

    `hosts` are names, without a port, that it may be called by; `origins` of pages beside its own that may call it;
    `key` is the bearer key, if any. At most `workers` answers are generated concurrently, `queue` more wait, and the
    rest get status 429. `body_bytes` and `max_tokens` bound a request and an answer.
    """

    hosts: tuple[str, ...] = LOOPBACK
    origins: tuple[str, ...] = ()
    key: str | None = None
    workers: int = 1
    queue: int = 16
    body_bytes: int = 2 << 20
    max_tokens: int = 4096


def server_names(host: str, more: Sequence[str]) -> tuple[str, ...]:
    """Names that a server at an address may be called by."""
    own = () if host in _ANYWHERE else (f"[{host}]" if ":" in host else host,)
    return tuple(dict.fromkeys((*LOOPBACK, *own, *(name.lower() for name in more))))


def read_key(path: Path | None) -> str | None:
    """The key in a file, or else in the environment; None where there is none.

    Raises:
        EdgeComposeError: the file cannot be read, or the key is short enough to be guessed.
    """
    try:
        key = os.environ.get(KEY_VARIABLE, "") if path is None else path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeComposeError(f"the key file '{path}' cannot be read: {error}") from error
    if path is None and not key:
        return None
    if len(key) < _SHORTEST_KEY:
        raise EdgeComposeError(f"the key has {len(key)} characters; expected {_SHORTEST_KEY} or more")
    return key
