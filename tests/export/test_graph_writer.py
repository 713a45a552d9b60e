"""Tensors lie where their descriptions say, in whatever order they were written; ONNX Runtime reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="a package of edgecompose-export")

import onnx
import onnxruntime
from onnx import TensorProto

from edgecompose_export.graphs.writer import MICROSOFT, DataFile, GraphWriter


def test_a_graph_with_its_data_beside_it_is_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=shape).astype(np.float32) for shape in ((7, 5), (5, 3)))
    graph = GraphWriter("products")
    with DataFile(tmp_path / "x.onnx.data") as data:
        for name, values in (("first", first), ("second", second)):
            data.reserve(name, "float32", values.shape)
        data.alias("turned", "second", (3, 5))
        position = 0
        for row in second:  # the last one first, row by row
            position = data.write("second", row, position)
        data.write("first", first)
        for name in ("first", "second", "turned"):
            graph.tensor(data.tensors[name])
    source = graph.input("x", TensorProto.FLOAT, ["n", 7])
    product = graph.node("MatMul", [source, "first"], "a")
    graph.node("MatMul", [product, "second"], "b")
    graph.node("FusedMatMul", [product, "turned"], "c", domain=MICROSOFT, transB=1)
    for name in ("b", "c"):
        graph.output(name, TensorProto.FLOAT, ["n", 3])
    graph.save(tmp_path / "x.onnx")
    onnx.checker.check_model(tmp_path / "x.onnx")
    x = rng.normal(size=(4, 7)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    b, c = session.run(["b", "c"], {"x": x})
    assert np.allclose(b, x @ first @ second, atol=1e-5)
    assert np.allclose(c, x @ first @ second.reshape(3, 5).T, atol=1e-5)


@given(sizes=st.lists(st.tuples(st.sampled_from(["float32", "float16", "uint8"]), st.integers(1, 300)), max_size=8))
def test_places_are_aligned_and_apart(tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[str, int]]) -> None:
    path = tmp_path_factory.mktemp("data") / "x.data"
    width = {"float32": 4, "float16": 2, "uint8": 1}
    with DataFile(path) as data:
        for i, (dtype, count) in enumerate(sizes):
            data.reserve(str(i), dtype, [count])
        for i, (dtype, count) in reversed(list(enumerate(sizes))):
            data.write(str(i), np.full(count * width[dtype], i + 1, np.uint8))
    content, end = path.read_bytes(), 0
    for i, (dtype, count) in enumerate(sizes):
        entries = {entry.key: entry.value for entry in data.tensors[str(i)].external_data}
        offset, length = int(entries["offset"]), int(entries["length"])
        assert offset % 64 == 0 and offset >= end and length == count * width[dtype]
        assert content[offset : offset + length] == bytes([i + 1]) * length
        end = offset + length
    assert len(content) == end


def test_more_than_was_reserved_is_not_written(tmp_path: Path) -> None:
    with DataFile(tmp_path / "x.data") as data:
        data.reserve("a", "uint8", [4])
        data.reserve("b", "uint8", [4])
        with pytest.raises(ValueError, match="'a' has 4 bytes, got 5"):
            data.write("a", np.zeros(5, np.uint8))
        with pytest.raises(ValueError, match="'a' has 4 bytes, got 5"):
            data.write("a", np.zeros(1, np.uint8), 4)


def test_equal_constants_are_kept_once() -> None:
    graph = GraphWriter("constants")
    names = {
        graph.constant([1, 2]),
        graph.constant([1, 2]),
        graph.constant([[1, 2]]),
        graph.constant([1.0], np.float32),
    }
    assert len(names) == 3 == len(graph.initializers)
