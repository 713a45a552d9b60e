"""Settings of a server: host names, origins, key, and limits."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecompose.errors import EdgeComposeError

#: Names of this machine that nothing outside of it can use.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
KEY_VARIABLE = "EDGECOMPOSE_API_KEY"
_ANYWHERE = ("0.0.0.0", "::")
_SHORTEST_KEY = 16
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Bounds of one call, of whatever transport.

    Attributes:
        max_tokens: the longest answer; a call that names more gets this many. None is as long as the context.
        messages: of a conversation.
        prompts: of a call to /v1/completions.
        inputs: texts of a call to /v1/embeddings.
        choices: answers to score.
        choice_characters: of all those answers together.
        stops: stop strings.
        stop_characters: of one stop string.
    """

    max_tokens: int | None = None
    messages: int = 4096
    prompts: int = 128
    inputs: int = 2048
    choices: int = 256
    choice_characters: int = 16_384
    stops: int = 16
    stop_characters: int = 1024


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        hosts: names, without a port, that it may be called by.
        origins: of pages beside its own that may call it, as `server_origins` gives them.
        key: the bearer key, if any.
        aliases: other names of the model `auto`.
        calls: bounds of one call.
        workers: threads that compute; None is one for each answer in progress.
        active: answers in progress, which are written together; where there are fewer threads, they take turns.
        queue: requests that wait for a place among them; the next gets status 429.
        connections: open at a time; the next gets status 503.
        body_bytes: of a request.
        header_seconds: from the first byte of a request, or the beginning of a connection, to the end of its header.
        body_seconds: from there to the end of its body.
        write_seconds: that a client may leave an answer unread before its connection is ended.
        idle_seconds: that a connection is kept open between requests.
        first_seconds: that a stream waits for its first chunk, so that an error is a status, before its header is sent.
        comment_seconds: between the comments that tell the client of a stream that its answer is still to come.
        grace_seconds: from a signal to the end of the process.
    """

    hosts: tuple[str, ...] = LOOPBACK
    origins: tuple[str, ...] = ()
    key: str | None = None
    aliases: tuple[str, ...] = ()
    calls: CallLimits = CallLimits()
    workers: int | None = None
    active: int = 8
    queue: int = 128
    connections: int = 512
    body_bytes: int = 2 << 20
    header_seconds: float = 10
    body_seconds: float = 30
    write_seconds: float = 30
    idle_seconds: float = 30
    first_seconds: float = 0.5
    comment_seconds: float = 5
    grace_seconds: float = 5

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.active if self.workers is None else self.workers


def is_loopback(host: str) -> bool:
    """Whether nothing outside of this machine can reach an address."""
    try:
        return ipaddress.ip_address(bare_host(host)).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def bare_host(host: str) -> str:
    """An address without the brackets that an IPv6 one has in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def server_names(host: str, more: Sequence[str]) -> tuple[str, ...]:
    """Names that a server at an address may be called by, without ports.

    Raises:
        EdgeComposeError: one of `more` is no name of a host, so that no request could ever match it.
    """
    host = bare_host(host).lower()
    own = () if host in _ANYWHERE else (f"[{host}]" if ":" in host else host,)
    return tuple(dict.fromkeys((*LOOPBACK, *own, *map(_host_name, more))))


def server_origins(values: Iterable[str]) -> tuple[str, ...]:
    """Origins of pages, as browsers send them: scheme://host[:port], in small letters, without a default port.

    Raises:
        EdgeComposeError: one is no origin, so that no page could ever match it, or is every page's.
    """
    return tuple(dict.fromkeys(map(_origin, values)))


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
    if not key.isascii() or not key.isprintable() or " " in key:
        raise EdgeComposeError("the key holds a space, a control character or no ASCII; expected visible ASCII alone")
    return key


def _host_name(text: str) -> str:
    match = _HOST.fullmatch(text.lower())
    if match is None:
        raise EdgeComposeError(f"--allow-host {text!r:.200} is no name of a host; expected one such as work.local")
    return match[1]


def _origin(text: str) -> str:
    if text in ("*", "null"):
        raise EdgeComposeError(f"--allow-origin {text} would let any page use this server; name each site")
    match = _ORIGIN.fullmatch(text.lower())
    if match is None or int(match[3] or 0) > 65535:
        head = _ORIGIN.match(text.lower())
        hint = f", such as {head[0]}" if head else f", such as http://{text.split('/')[0]}" if "://" not in text else ""
        raise EdgeComposeError(f"--allow-origin {text!r:.200} is no origin; expected scheme://host[:port] alone{hint}")
    scheme, host, port = match.groups()
    return f"{scheme}://{host}" if port in (None, _DEFAULT_PORTS.get(scheme)) else f"{scheme}://{host}:{int(port)}"
