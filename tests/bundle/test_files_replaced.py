"""An opened bundle keeps its adapters, whatever becomes of the directory."""

from __future__ import annotations

import gc
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecompose.bundle.atomic import new_folder
from edgecompose.bundle.files import Bundle
from edgecompose.errors import FileDamaged
from tests.factories import write_bundle

NAME = "adapters/two.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def replace(root: Path) -> None:
    with new_folder(root, replace=True) as work:
        shutil.copytree(root, work, dirs_exist_ok=True)
        (work / NAME).write_bytes(b"another one 1234")


def move_away(root: Path) -> None:
    root.rename(root.with_name("away"))


@pytest.mark.parametrize("change", [replace, move_away, shutil.rmtree])
def test_an_adapter_is_read_as_it_was_when_the_bundle_was_opened(root: Path, change: Callable[[Path], object]) -> None:
    content, bundle = (root / NAME).read_bytes(), Bundle(root)
    change(root)
    assert bundle.changed
    assert bundle.adapter_content("two") == content
    assert bundle.adapter_content("two") == content, "a descriptor is read from its beginning"


@pytest.mark.parametrize("content", [b"", b"1234567890123456", b"12345678901234567"])
def test_a_file_that_was_written_over_is_refused(root: Path, content: bytes) -> None:
    bundle = Bundle(root)
    (root / NAME).write_bytes(content)
    with pytest.raises(FileDamaged, match=rf"'{NAME}' has (sha256 .*|\d+ bytes), the manifest says"):
        bundle.adapter_content("two")
    assert bundle.adapter_content("one") == (root / "adapters/one.safetensors").read_bytes()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="seen on Linux")
def test_descriptors_are_closed_with_the_bundle(root: Path) -> None:
    gc.collect()
    before = descriptors()
    bundles = [Bundle(root) for _ in range(5)]
    assert descriptors() == before + 10
    bundles.clear()
    gc.collect()
    assert descriptors() == before


def test_where_there_are_few_descriptors_files_are_opened_when_they_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (6, 6))
    bundle = Bundle(root)
    assert bundle.adapter_content("two") == (root / NAME).read_bytes()
    shutil.rmtree(root)
    assert bundle.adapter_content("one"), "a quarter of six is one"
    with pytest.raises(FileDamaged, match=f"'{NAME}' cannot be read"):
        bundle.adapter_content("two")
