"""How many threads a session gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import edgecompose
from edgecompose.engine import device

GRAPH = min((Path(edgecompose.__file__).parent / "merging" / "graphs").glob("*.onnx"))


@pytest.mark.parametrize(("allowed", "threads", "expected"), [(1, None, 1), (4, None, 0), (1, 3, 3)])
def test_a_session_takes_no_more_threads_than_the_process_may_run(
    monkeypatch: pytest.MonkeyPatch, allowed: int, threads: int | None, expected: int
) -> None:
    """0 is ONNX Runtime's word for one per core of the machine."""
    monkeypatch.setattr(device, "usable_cores", lambda: allowed)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    session = device.open_session(GRAPH, device.choose_device("cpu"), name="any", threads=threads)
    assert session.get_session_options().intra_op_num_threads == expected
