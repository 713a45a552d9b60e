"""Block types of GGUF files: the values of the package gguf, and bases near their own float values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")


from edgecompose.errors import ExportError
from edgecompose_export.calibration.comparison import compare
from edgecompose_export.calibration.logits import float_logits
from edgecompose_export.calibration.reference import float_states
from edgecompose_export.calibration.stored import stored_logits, stored_states
from edgecompose_export.graphs.decoder import write_decoder
from edgecompose_export.graphs.stored_weights import StoredWeights
from edgecompose_export.graphs.writer import DataFile
from edgecompose_export.weights.gguf_blocks import GGUF_FORMS, read_blocks
from edgecompose_export.weights.places import EMBEDDING, linear_tensors
from edgecompose_export.weights.source import open_weights
from tests.export.gguf_bases import IDS, source_forms
from tests.gguf_models import MODELS, quantized, write_gguf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A Hugging Face folder of each model."""
    root = tmp_path_factory.mktemp("models")
    return {name: model.write(root / name) for name, model in MODELS.items()}


def finite_blocks(data: st.DataObject, kind: str) -> npt.NDArray[np.uint8]:
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    rows = data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(0, 256, (rows, 3 * size), np.uint8)


@pytest.mark.parametrize("kind", GGUF_FORMS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_blocks_stand_for_the_values_of_gguf(kind: str, data: st.DataObject) -> None:
    raw = finite_blocks(data, kind)
    with np.errstate(invalid="ignore", over="ignore"):
        values = gguf.quants.dequantize(raw, GGMLQuantizationType[kind])
    if not np.isfinite(values).all():
        with pytest.raises(ExportError, match="a scale is not a finite number; the file is damaged"):
            read_blocks(raw, kind)
        return
    ours = read_blocks(raw, kind).values(values.shape[1])
    np.testing.assert_allclose(ours, values, rtol=1e-5, atol=1e-6 * np.abs(values).max())


#: Every matrix has rows of whole super-blocks.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}


@pytest.mark.parametrize("kind", [*GGUF_FORMS, "F16", "BF16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_base_of_each_type_is_near_its_own_float_values(kind: str, name: str, tmp_path: Path) -> None:
    source = open_weights(write_gguf(tmp_path / "model.gguf", MODELS[name].write(tmp_path / "model", **WIDE), kind))
    assert {source.type_of(tensor) for tensor in (EMBEDDING, *linear_tensors(source.config))} == {kind}
    with DataFile(tmp_path / "decoder.onnx.data") as data:
        weights = StoredWeights(source, source_forms(source), data)
        write_decoder(source.config, weights, slots=True)
        weights.fill()
    exact = float_states(source, [IDS]).states[0]
    stored = stored_states(source, weights, tmp_path, prompts=[IDS])[0]
    logits = stored_logits(source.config, weights, tmp_path, states=stored)
    result = compare(float_logits(source, exact), logits, [*IDS[1:], -1])
    assert result.positions == len(IDS)
    assert 0 <= result.kl + 1e-6 < 0.01


@pytest.mark.parametrize("kind", ["IQ2_XXS", "TQ1_0", "MXFP4", "IQ1_S", "IQ3_XXS", "Q8_K"])
def test_types_without_a_form_are_refused_by_name(kind: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    known = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[known]
    folder = MODELS["llama"].write(tmp_path / "model", **WIDE)
    extra = {"blk.0.ffn_up.weight": np.zeros((512, 256 // block * size), np.uint8)}
    path = _with_type(tmp_path, folder, extra, known)
    message = rf"1 tensors have an unknown type.*blk\.0\.ffn_up\.weight \({kind}\)"
    with pytest.raises(ExportError, match=message):
        open_weights(path)
    with pytest.raises(ExportError, match=f"weights have the type {kind}, expected one of F32, F16, BF16, Q8_0"):
        read_blocks(np.zeros((1, size), np.uint8), kind)


def _with_type(tmp_path: Path, folder: Path, extra: dict[str, npt.NDArray[Any]], kind: GGMLQuantizationType) -> Path:
    return write_gguf(tmp_path / "model.gguf", folder, extra=extra, extra_type=kind)


def test_a_type_of_another_time_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", folders["llama"])
    content = bytearray(path.read_bytes())
    name = b"blk.1.ffn_down.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.gguf.*'blk\.1\.ffn_down\.weight' is of type 99, which is not known"):
        open_weights(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_refused(value: float, folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = MODELS["llama"].write(tmp_path / "model", **WIDE)
    raw = quantized(np.zeros((512, 256), np.float32), "Q4_K")
    raw[3, :2] = np.array([value], "<f2").view(np.uint8)
    path = _with_type(tmp_path, folder, {"blk.0.ffn_up.weight": raw}, GGMLQuantizationType.Q4_K)
    source = open_weights(path)
    with pytest.raises(
        ExportError, match=r"base 'model\.gguf'.*'blk\.0\.ffn_up\.weight'.*scale is not a finite number"
    ):
        source.blocks("0.up_proj.weight")
    with pytest.raises(ExportError, match=r"base 'model\.gguf'.*'blk\.0\.ffn_up\.weight'.*not finite"):
        source.floats("0.up_proj.weight")
