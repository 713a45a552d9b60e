"""The merge graphs that ship are those that the code builds."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgecompose

pytest.importorskip("onnx", reason="building graphs needs a package of edgecompose-export")
merge_graphs = pytest.importorskip("edgecompose_export.graphs.merge", reason="the export package is not on the path")

PACKAGE = Path(edgecompose.__file__).parent


def test_the_shipped_graphs_are_those_that_the_code_builds() -> None:
    expected = merge_graphs.all_graphs()
    assert {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.onnx")} == set(expected)
    for name, content in expected.items():
        assert (PACKAGE / name).read_bytes() == content, (
            f"{name} is stale: run 'edgecompose-export merge-graphs edgecompose'"
        )


def test_writing_is_reproducible(tmp_path: Path) -> None:
    written = merge_graphs.write_graphs(tmp_path)
    assert len(written) == 29
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in written} == merge_graphs.all_graphs()
