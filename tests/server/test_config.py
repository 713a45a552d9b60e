"""Names and keys of a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecompose.errors import EdgeComposeError
from edgecompose.server.config import LOOPBACK, is_loopback, read_key, server_names, server_origins


def test_names_of_a_server() -> None:
    assert server_names("127.0.0.1", ()) == LOOPBACK
    assert server_names("0.0.0.0", ("Work.local",)) == (*LOOPBACK, "work.local")
    assert server_names("fe80::1", ()) == server_names("[FE80::1]", ()) == (*LOOPBACK, "[fe80::1]")


def test_names_that_no_request_has_are_refused_at_the_start() -> None:
    assert server_names("127.0.0.1", ("Work.local:8080", "[fe80::1]:1")) == (*LOOPBACK, "work.local", "[fe80::1]")
    for name in ("http://work.local", "work.local/", "", "*", "a b"):
        with pytest.raises(EdgeComposeError, match="no name of a host"):
            server_names("127.0.0.1", (name,))


@pytest.mark.parametrize(("host", "own"), [("127.0.0.2", True), ("::1", True), ("[::1]", True), ("localhost", True)])
def test_addresses_of_this_machine(host: str, own: bool) -> None:
    assert is_loopback(host) is own
    assert not is_loopback("0.0.0.0") and not is_loopback("10.0.0.1") and not is_loopback("work.local")


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("http://localhost:3000", "http://localhost:3000"),
        ("HTTPS://Tool.Example:443", "https://tool.example"),
        ("http://a.b:80", "http://a.b"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("tauri://localhost", "tauri://localhost"),
        ("http://[::1]:5173", "http://[::1]:5173"),
    ],
)
def test_origins_are_kept_as_browsers_send_them(text: str, origin: str) -> None:
    assert server_origins([text, text]) == (origin,)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("localhost:3000", "such as http://localhost:3000"),
        ("http://localhost:3000/", "such as http://localhost:3000"),
        ("http://a.b/page", "such as http://a.b"),
        ("*", "name each site"),
        ("null", "name each site"),
        ("http://", "expected scheme://host"),
        ("http://a.b:99999", "expected scheme://host"),
        ("", "expected scheme://host"),
    ],
)
def test_what_no_page_can_match_is_refused_at_the_start(text: str, hint: str) -> None:
    with pytest.raises(EdgeComposeError, match=hint):
        server_origins([text])


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGECOMPOSE_API_KEY", raising=False)
    assert read_key(None) is None
    file = tmp_path / "key"
    file.write_text("0123456789abcdef\n")
    assert read_key(file) == "0123456789abcdef"
    monkeypatch.setenv("EDGECOMPOSE_API_KEY", "fedcba9876543210")
    assert read_key(None) == "fedcba9876543210"
    for content in (b"", b"short", b"\xff" * 20, b"two words are not one", "ключ-из-двадцати-букв".encode()):
        file.write_bytes(content)
        with pytest.raises(EdgeComposeError):
            read_key(file)
    with pytest.raises(EdgeComposeError, match="cannot be read"):
        read_key(tmp_path / "absent")
