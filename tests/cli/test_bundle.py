"""The commands of `bundle`: tasks come and go, and older bundles are converted."""

from __future__ import annotations

import json
from pathlib import Path

from edgecompose.bundle.files import read_manifest, verify
from edgecompose.bundle.manifest import MANIFEST_FILE
from tests.cli.calls import call, fault_of, result_of
from tests.fixtures_tiny import TASKS


def test_a_task_is_added_and_removed(bundle_copy: Path, new_task: tuple[Path, Path]) -> None:
    adapter, examples = new_task
    arguments = ("bundle", "add-task", bundle_copy, "travel", "--adapter", adapter, "--examples", examples)
    result = result_of(*arguments, "--bits", 8)
    assert result["tasks"]["travel"]["examples"] == 3 and result["adapters"]["travel"]["bits"] == 8
    assert "already has a task 'travel'" in fault_of(*arguments)
    assert set(result_of("bundle", "remove-task", bundle_copy, "travel")["tasks"]) == set(TASKS)
    assert "has no task 'travel'" in fault_of("bundle", "remove-task", bundle_copy, "travel")
    assert verify(bundle_copy) == []


def test_an_older_bundle_is_refused_with_the_command_that_converts_it(bundle_copy: Path) -> None:
    path = bundle_copy / MANIFEST_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(fields | {"schema_version": 4}), encoding="utf-8")
    assert f"convert it with: edgecompose bundle upgrade {bundle_copy}" in fault_of("inspect", bundle_copy)
    path.write_text(json.dumps(fields), encoding="utf-8")
    done = call("bundle", "upgrade", bundle_copy)
    assert done.exit_code == 0 and "schema version 5" in done.stdout
    assert read_manifest(bundle_copy).schema_version == 5
