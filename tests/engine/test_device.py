"""How many threads a session gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import edgecompose
from edgecompose.engine import device
from edgecompose.errors import BundleError

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


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x08\x0a", GRAPH.read_bytes()[:-40]])
def test_a_graph_that_cannot_be_opened_is_one_error(content: bytes) -> None:
    with pytest.raises(BundleError, match="^ONNX Runtime refuses the any graph: .*; export the bundle again$"):
        device.open_session(content, device.choose_device("cpu"), name="any")


def test_a_graph_that_cannot_be_run_is_one_error() -> None:
    session = device.open_session(GRAPH, device.choose_device("cpu"), name="any")
    with pytest.raises(BundleError, match="^the any graph cannot be run: .*; export the bundle again$"):
        device.run_bound(session, session.io_binding(), name="any")


def test_a_graph_with_a_name_that_is_no_text_is_one_error() -> None:
    content = GRAPH.read_bytes()
    name = device.open_session(GRAPH, device.choose_device("cpu"), name="any").get_inputs()[0].name.encode()
    with pytest.raises(BundleError, match="^ONNX Runtime refuses the any graph: .*utf-8"):
        device.open_session(content.replace(name, b"\x93" + name[1:]), device.choose_device("cpu"), name="any")
