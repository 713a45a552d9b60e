"""A few seeded cases of each target of formats and texts; `make fuzz` runs as many as there is time for."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("edgecompose_export", reason="bases and recipes are read by the exporter")
pytest.importorskip("gguf", reason="a package of edgecompose-export")

from tests.attack.formats_targets import TARGETS as FORMATS
from tests.attack.fuzz import attack
from tests.attack.target import Target
from tests.attack.texts_targets import TARGETS as TEXTS

#: It starts processes; `make check` leaves it out.
pytestmark = pytest.mark.slow

CASES = {"template": 25, "base-folder": 10, "peft": 40}


@pytest.mark.parametrize("target", [*FORMATS, *TEXTS], ids=lambda target: target.name)
def test_no_case_of_a_short_run_is_a_finding(tmp_path: Path, target: Target) -> None:
    (summary,) = attack([target], seed=0, findings=tmp_path / "findings", cases=CASES.get(target.name, 60))
    assert summary.tried == CASES.get(target.name, 60)
    assert not +summary.findings, (summary.findings, summary.places)
    assert summary.refused and (summary.accepted or target.name == "template")
