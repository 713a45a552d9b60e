"""The merge graphs that ship are those that the code builds."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgecompose

pytest.importorskip("onnx", reason="building graphs wants the packages of the extra [export]")
merge_graphs = pytest.importorskip("edgecompose_export.graphs.merge", reason="the export package is not on the path")

FOLDER = Path(edgecompose.__file__).parent / "merging" / "graphs"


def test_the_shipped_graphs_are_those_that_the_code_builds() -> None:
    wanted = merge_graphs.all_graphs()
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(wanted)
    for name, content in wanted.items():
        assert (FOLDER / name).read_bytes() == content, f"{name} is stale: run 'edgecompose-export merge-graphs'"


def test_writing_is_reproducible(tmp_path: Path) -> None:
    written = merge_graphs.write_graphs(tmp_path / "merging" / "graphs")
    assert len(written) == 28
    assert {path.name: path.read_bytes() for path in written} == merge_graphs.all_graphs()
