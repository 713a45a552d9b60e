"""Decoders with quantised keys and values: their scales, their graphs, and which a base gets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("onnx", reason="a package of edgecompose-export")

import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgecompose import Request, open_bundle
from edgecompose.bundle.files import read_manifest, verify
from edgecompose.bundle.records import value_from_json
from edgecompose.bundle.specs import BaseSpec
from edgecompose.errors import ExportError, GenerationError, ManifestInvalid
from edgecompose_export.base import write
from edgecompose_export.base.export import export_base
from edgecompose_export.calibration.kv_scales import KVRanges
from edgecompose_export.calibration.reference import float_states
from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.graphs.kv_cache import narrow_caches
from edgecompose_export.weights.source import open_weights
from tests import gguf_models
from tests.fixtures_tiny import TASKS, TinyZoo

PROMPT = TASKS["animals"][0]


def config_of(folder: Path) -> DecoderConfig:
    return open_weights(gguf_models.MODELS["llama"].write(folder / "source")).config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DecoderConfig:
    return config_of(tmp_path_factory.mktemp("kv"))


@given(seed=st.integers(0, 1000), length=st.integers(1, 12), shift=st.integers(0, 400))
def test_no_key_that_is_read_elsewhere_exceeds_its_channel(
    config: DecoderConfig, seed: int, length: int, shift: int
) -> None:
    """All but the first key, at positions that are `shift` farther."""
    rng = np.random.default_rng(seed)
    shape = (1, config.kv_heads, length, config.head_size)
    keys, values = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    ranges = KVRanges.of(config, 0, [{"key": keys, "value": values}]).largest
    index = config.layers[0].rotary
    assert index is not None
    frequencies, pairs = config.rotaries[index].frequencies, config.rotaries[index].pairs
    angles = min(shift, config.context - length) * frequencies
    one, other = keys[..., :pairs], keys[..., pairs : 2 * pairs]
    far = np.concatenate(
        [one * np.cos(angles) - other * np.sin(angles), other * np.cos(angles) + one * np.sin(angles)], -1
    )
    assert (np.abs(keys[..., : 2 * pairs]) <= ranges["key"][None, :, None, : 2 * pairs] + 1e-6).all()
    assert (np.abs(far[:, :, 1:]) <= 1.01 * ranges["key"][None, :, None, : 2 * pairs]).all()
    np.testing.assert_array_equal(ranges["value"], np.abs(values).max((0, 2)))


def test_scales_reach_the_largest_value_with_the_largest_code() -> None:
    ranges = KVRanges({"key": np.array([[2.54, 0.0]], np.float32), "value": np.array([[1.27, 7.0]], np.float32)})
    assert ranges.scales(8)["key"] == pytest.approx([0.02, 1e-5 / 127])
    assert ranges.scales(4)["value"] == pytest.approx([1.27 / 7, 1.0])


def test_a_graph_without_attention_is_refused() -> None:
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "g", [], [])
    with pytest.raises(ExportError, match="no GroupQueryAttention"):
        narrow_caches(graph, 8)


def test_more_texts_widen_scales_and_change_no_states(tmp_path: Path) -> None:
    source = open_weights(gguf_models.MODELS["llama"].write(tmp_path / "source"))
    plain = float_states(source, [[5, 6, 7, 8]], kv_bits=(8,))
    wide = float_states(source, [[5, 6, 7, 8]], kv_bits=(8,), kv_texts=[[9, 10, 11, 12, 13], [40]])
    np.testing.assert_array_equal(plain.states[0], wide.states[0])
    assert plain.kv_scales[8].keys() == wide.kv_scales[8].keys()
    assert all((wide.kv_scales[8][name] >= scales).all() for name, scales in plain.kv_scales[8].items())
    assert any((wide.kv_scales[8][name] > scales).any() for name, scales in plain.kv_scales[8].items())
    difference = np.abs(plain.kv_states[8][0] - plain.states[0]).max()
    assert 0 < difference < 0.1 * np.abs(plain.states[0]).max()


@pytest.mark.slow
def test_only_caches_change_and_no_weight_is_stored_twice(zoo: TinyZoo) -> None:
    base = zoo.base("llama", "int8")
    assert base.spec.kv_graphs["int8"].graph == "decoder_kv8.onnx" and 0 <= base.spec.kv_graphs["int8"].kl < 0.02
    exact, kv = (
        onnx.load(base.folder / n, load_external_data=False).graph for n in ("decoder.onnx", "decoder_kv8.onnx")
    )
    assert [n.op_type for n in exact.node] == [n.op_type for n in kv.node]
    assert list(kv.initializer)[: len(exact.initializer)] == list(exact.initializer)
    assert len(kv.initializer) == len(exact.initializer) + 2 * base.spec.layers
    for old, new in zip((*exact.input, *exact.output), (*kv.input, *kv.output), strict=True):
        cached = new.name.startswith(("past_key_values", "present"))
        assert new.type.tensor_type.elem_type == (TensorProto.INT8 if cached else old.type.tensor_type.elem_type)
    assert not (base.folder / "decoder_kv8.onnx.data").exists()


@pytest.mark.slow
def test_a_kind_that_is_far_from_float_caches_is_left_out_and_said(
    zoo: TinyZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "LARGEST_KV_KL", -1.0)
    steps: list[str] = []
    spec = export_base(zoo.model("llama"), tmp_path / "base", "fp32", advance=steps.append)
    assert spec.kv_graphs == {} and not list((tmp_path / "base").glob("*_kv*"))
    assert [s[:13] for s in steps if s.startswith("no int")] == ["no int8 cache", "no int4 cache"]


@pytest.mark.slow
def test_a_base_that_was_described_before_has_float_caches_only(zoo: TinyZoo) -> None:
    fields = json.loads(json.dumps(dataclasses.asdict(zoo.base("llama", "int8").spec)))
    del fields["kv_graphs"]
    assert value_from_json(BaseSpec, fields, "base").kv_graphs == {}
    fields["kv_graphs"] = {"int2": {"graph": "x.onnx", "kl": 0.0}}
    with pytest.raises(ManifestInvalid, match="kv_graphs of the base name 'int2'; expected int8 and int4"):
        value_from_json(BaseSpec, fields, "base")


@pytest.mark.slow
def test_a_bundle_answers_with_quantised_keys_and_values(bundle: Path) -> None:
    spec = read_manifest(bundle).base.kv_graphs["int8"]
    assert spec.graph == "base/decoder_kv8.onnx" and verify(bundle) == []
    with open_bundle(bundle, device="cpu", kv_cache="int8") as composer:
        answers = [composer.run(PROMPT), *composer.batch([PROMPT, TASKS["numbers"][0]])]
    texts = [answer.text for answer in answers if not isinstance(answer, Exception)]
    assert len(texts) == 3 and texts[0] == texts[1]
    assert [answer.kv_cache for answer in answers if not isinstance(answer, Exception)] == ["int8"] * 3


@pytest.mark.slow
def test_a_fused_blend_beside_a_quantised_cache_is_refused(bundle: Path) -> None:
    message = "a fused base has a KV cache in float32, not in int8; leave out"
    with open_bundle(bundle, device="cpu", kv_cache="int8") as composer, pytest.raises(GenerationError, match=message):
        composer.run(PROMPT, Request(attachment="fuse", weights={"animals": 1.0}))
