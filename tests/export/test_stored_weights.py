"""Weights in a data file give the values of the base's own file, in every form, looked up or multiplied with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("onnx", reason="a package of edgecompose-export")

from onnx import TensorProto

from edgecompose_export.graphs.stored_weights import StoredWeights
from edgecompose_export.graphs.writer import DataFile, GraphWriter
from edgecompose_export.weights import forms as weight_forms
from edgecompose_export.weights.blocks import BlockForm
from edgecompose_export.weights.forms import EIGHT, FLOAT_FORMS, FOUR, Form, source_form
from edgecompose_export.weights.gguf_blocks import GGUF_FORMS
from edgecompose_export.weights.places import EMBEDDING, HEAD, linear_tensors
from edgecompose_export.weights.source import WeightSource, open_weights
from tests import gguf_models

pytestmark = pytest.mark.slow

Float = npt.NDArray[np.float32]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
IDS = np.array([[3, 299, 0, 17, 17]], np.int64)


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, so that matrices are written in several parts."""
    monkeypatch.setattr(weight_forms, "_CHUNK", 1 << 12)


def own_forms(source: WeightSource) -> dict[str, Form]:
    """Every tensor as the file has it."""
    head = EMBEDDING if source.config.tied else HEAD
    forms = {tensor: source_form(source.type_of(tensor)) for tensor in linear_tensors(source.config)}
    return forms | {HEAD: source_form(source.type_of(head)), EMBEDDING: source_form(source.type_of(EMBEDDING))}


def open_model(folder: Path, kind: str, **changes: Any) -> WeightSource:
    model = gguf_models.MODELS["llama-bias"].write(folder / "model", **WIDE, **changes)
    return open_weights(gguf_models.write_gguf(folder / "model.gguf", model, kind))


def run(folder: Path, graph: GraphWriter, output: str, feeds: Mapping[str, npt.NDArray[Any]]) -> Float:
    graph.output(output, TensorProto.FLOAT, ["batch", "s", "n"])
    graph.save(folder / "x.onnx")
    session = onnxruntime.InferenceSession(folder / "x.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run([output], dict(feeds))[0])


def embedded(folder: Path, source: WeightSource, forms: Mapping[str, Form], head_too: bool) -> tuple[Float, set[str]]:
    """Embeddings of IDS, and the tensors of the data file."""
    graph = GraphWriter("embedding")
    with DataFile(folder / "x.onnx.data") as data:
        weights = StoredWeights(source, forms, data)
        if head_too:
            other = GraphWriter("head")
            weights.head(other, other.input("hidden", TensorProto.FLOAT, ["batch", "s", source.config.hidden]))
        rows = weights.embed(graph, graph.input("ids", TensorProto.INT64, ["batch", "s"]))
        weights.fill()
    return run(folder, graph, rows, {"ids": IDS}), set(data.tensors)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [*GGUF_FORMS, "F32", "F16", "BF16"])
def test_embeddings_are_the_values_of_the_file(kind: str, tied: bool, tmp_path: Path) -> None:
    source = open_model(tmp_path, kind, tie_word_embeddings=tied)
    exact = source.floats(EMBEDDING)[IDS]
    for head_too in (False, True):
        rows, tensors = embedded(tmp_path, source, own_forms(source), head_too)
        assert rows.shape == exact.shape
        np.testing.assert_allclose(rows, exact, rtol=0, atol=4e-6 * np.abs(exact).max())
        form = source_form(kind)
        shares = tied and not (isinstance(form, BlockForm) and form.offsets)
        assert any(name.startswith("embedding.") for name in tensors) == (
            not shares or isinstance(form, BlockForm)
        )  # an alias, of the bytes of the head


@pytest.mark.parametrize("form", [EIGHT, FOUR, BlockForm(8, 64)], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_that_are_rounded_are_within_a_step(form: BlockForm, tied: bool, tmp_path: Path) -> None:
    source = open_model(tmp_path, "F32", tie_word_embeddings=tied)
    forms = {**own_forms(source), EMBEDDING: form, HEAD: form}
    rows, _ = embedded(tmp_path, source, forms, head_too=True)
    exact = source.floats(EMBEDDING)[IDS]
    blocks = exact.reshape(*IDS.shape, -1, form.block)
    steps = (blocks.max(-1) - blocks.min(-1)) / 15 if form == FOUR else np.abs(blocks).max(-1) / 127
    errors = np.abs(rows - exact).reshape(blocks.shape).max(-1)
    assert (errors <= 0.502 * steps).all() and errors.max() > 0


def test_a_row_that_ends_within_a_block_is_whole(tmp_path: Path) -> None:
    folder = gguf_models.MODELS["llama"].write(tmp_path / "model", hidden_size=80, head_dim=20, num_hidden_layers=1)
    source = open_weights(folder)
    exact = source.floats(EMBEDDING)[IDS]
    for form in (EIGHT, FOUR):
        rows, _ = embedded(tmp_path, source, {**own_forms(source), EMBEDDING: form}, head_too=False)
        assert rows.shape == exact.shape
        assert 0 < np.abs(rows - exact).max() < np.abs(exact).max() / (14 if form == FOUR else 250)


def test_a_shared_embedding_reads_the_bytes_of_the_output_layer(tmp_path: Path) -> None:
    source = open_model(tmp_path, "Q8_0")
    forms: dict[str, Form] = {**own_forms(source), EMBEDDING: "shared"}
    rows, tensors = embedded(tmp_path, source, forms, head_too=True)
    np.testing.assert_array_equal(rows, source.floats(HEAD)[IDS])
    assert np.abs(rows - source.floats(EMBEDDING)[IDS]).max() > 0.1
    assert tensors == {"head.codes", "head.scales", "embedding.codes", "embedding.scales"}
    size = (tmp_path / "x.onnx.data").stat().st_size
    assert size == 300 * 256 + 300 * 8 * 4


TOLERANCES = {"Q4_1": 0.02, "Q4_K": 0.02, "Q2_K": 0.03}


@pytest.mark.parametrize("kind", [*GGUF_FORMS, "F32", "F16", "BF16"])
def test_products_are_those_of_the_values_of_the_file(kind: str, tmp_path: Path) -> None:
    """Floats to rounding; blocks to int8 activations: 1 in 100, and 1 in 50 (33) where offsets have twice 4 bits."""
    source = open_model(tmp_path, kind)
    x = np.random.default_rng(0).normal(size=(1, 4, 256)).astype(np.float32)
    forms = own_forms(source)
    for modules in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("down_proj",), ("gate_proj", "up_proj")):
        graph = GraphWriter("product")
        with DataFile(tmp_path / "x.onnx.data") as data:
            weights = StoredWeights(source, forms, data)
            assert weights.groups(0, modules) == [modules]
            source_name = graph.input("x", TensorProto.FLOAT, ["batch", "s", 256])
            name = weights.product(graph, 0, modules, source=source_name, target="y")
            written: list[int] = []
            weights.fill(written.append)
        matrix = np.concatenate([source.floats(f"0.{module}.weight") for module in modules])
        bias = np.concatenate([source.floats(f"0.{module}.bias") for module in modules])
        assert sum(written) == weights.values == matrix.size
        exact = x.astype(np.float64) @ matrix.T.astype(np.float64) + bias
        tolerance = 1e-5 if kind in FLOAT_FORMS else TOLERANCES.get(kind, 0.01)
        assert np.abs(run(tmp_path, graph, name, {"x": x}) - exact).max() < tolerance * np.abs(exact).max(), modules


def test_neighbours_of_one_form_are_one_product(tmp_path: Path) -> None:
    source = open_model(tmp_path, "F32")
    modules = ("q_proj", "k_proj", "v_proj")
    with DataFile(tmp_path / "x.onnx.data") as data:
        for forms in itertools.product((EIGHT, FOUR), repeat=3):
            named: dict[str, Form] = {f"0.{m}.weight": form for m, form in zip(modules, forms, strict=True)}
            groups = StoredWeights(source, named, data).groups(0, modules)
            assert tuple(m for group in groups for m in group) == modules
            assert len(groups) == 1 + (forms[0] != forms[1]) + (forms[1] != forms[2])
            assert all(len({named[f"0.{m}.weight"] for m in group}) == 1 for group in groups)
