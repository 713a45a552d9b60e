"""A short soak: a real server under mixed load stays as it is, and answers the same."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from tests.attack.soak import Soak

pytestmark = pytest.mark.slow


def test_a_server_under_load_stays_as_it_is(bundle: Path, tmp_path: Path) -> None:
    report = Soak(bundle, tmp_path, seed=1).run(6)
    assert report.faults == []
    assert len(report.done) >= 8 and report.exit_code == 143
