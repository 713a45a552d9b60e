"""Settings and fixtures that all tests share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import settings

from edgecompose.engine.device import choose_device
from edgecompose.merging.merger import Merger

pytest_plugins = ("tests.fixtures_tiny",)
settings.register_profile("edgecompose", deadline=None, max_examples=40, database=None, derandomize=True)
settings.load_profile("edgecompose")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave slow modules out before they are imported, where `-m "not slow"` deselects all that is in them."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    is_slow = re.search(r"^pytestmark = [^=]*pytest\.mark\.slow", text, re.MULTILINE)
    return True if is_slow else None


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HOME of its own for every test: nothing may depend on, or leave anything in, the real one."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return folder


@pytest.fixture(scope="session")
def merger() -> Merger:
    """A merger on the CPU, whose sessions are opened once for all tests."""
    return Merger(choose_device("cpu"))
