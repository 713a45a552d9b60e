"""Opening a tokenizer.json."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecompose.errors import BundleError
from edgecompose.generation.tokenizer import Tokenizer
from tests.factories import write_tokenizer

HELLO = [{"role": "user", "content": "hello {{ 1 + 1 }}"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages", "{% for m in messages %}", "{{ " + "(" * 3000 + " }}"])
def test_a_malformed_template_is_a_bundle_error(path: Path, template: str) -> None:
    with pytest.raises(BundleError, match="chat template"):
        Tokenizer(path, chat_template=template).chat(HELLO)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_malformed_tokenizer_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json' cannot be read"):
        Tokenizer(path)


def test_an_absent_tokenizer_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent\.json' cannot be read"):
        Tokenizer(tmp_path / "absent.json")
