"""Names and keys of a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecompose.errors import EdgeComposeError
from edgecompose.server.config import LOOPBACK, read_key, server_names

pytestmark = pytest.mark.slow


def test_names_of_a_server() -> None:
    assert server_names("127.0.0.1", ()) == LOOPBACK
    assert server_names("0.0.0.0", ("Work.local",)) == (*LOOPBACK, "work.local")
    assert server_names("fe80::1", ()) == (*LOOPBACK, "[fe80::1]")


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGECOMPOSE_API_KEY", raising=False)
    assert read_key(None) is None
    file = tmp_path / "key"
    file.write_text("0123456789abcdef\n")
    assert read_key(file) == "0123456789abcdef"
    monkeypatch.setenv("EDGECOMPOSE_API_KEY", "fedcba9876543210")
    assert read_key(None) == "fedcba9876543210"
    for content in (b"", b"short", b"\xff" * 20):
        file.write_bytes(content)
        with pytest.raises(EdgeComposeError):
            read_key(file)
    with pytest.raises(EdgeComposeError, match="cannot be read"):
        read_key(tmp_path / "absent")
