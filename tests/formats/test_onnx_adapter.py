"""The adapter file in ONNX Runtime's own loader, against the decoder with the blend attached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Request, open_bundle
from edgecompose.errors import MergeError
from edgecompose.formats.onnx_adapter import write_onnx_adapter

PROMPT = "the cat sat on a blue mat, twice"


@pytest.mark.parametrize("weights", [{"animals": 1.0}, {"animals": 0.5, "numbers": 0.75, "colours": -0.5}], ids=str)
def test_onnxruntime_loads_it_and_gives_the_same_logits(
    bundle: Path, tmp_path: Path, weights: dict[str, float]
) -> None:
    with open_bundle(bundle, device="cpu") as composer:
        merged = composer.compose(PROMPT, Request(weights=weights)).merged
        path = write_onnx_adapter(merged, tmp_path / "made" / "blend.onnx_adapter")
        ids = composer.model.tokenizer.encode(PROMPT)
        expected = composer.model.decoder.start(merged, len(ids)).forward(ids, rows=len(ids)).copy()
        spec = composer.bundle.manifest.base
        graph = composer.bundle.path(spec.graph)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    empty = np.zeros((1, spec.kv_heads, len(ids) + 1, spec.head_size), np.float32)
    feed = {
        "input_ids": np.array([ids], np.int64),
        "logits_at": np.arange(len(ids)),
        "seqlens_k": np.array([len(ids)], np.int32),
        "query_seqlens": np.array([len(ids) + 1], np.int32),
        "total_sequence_length": np.array(len(ids) + 1, np.int32),
        "slot_layout": np.array([len(ids), 1, 1], np.int64),
        **{f"past_key_values.{i}.{part}": empty for i in range(spec.layers) for part in ("key", "value")},
    }
    plain, result = session.run(["logits"], feed)[0], session.run(["logits"], feed, options)[0]
    np.testing.assert_allclose(result, expected, atol=2e-5)
    assert np.abs(plain - expected).max() > 1e-2


def test_nothing_is_overwritten_and_nothing_is_written_for_nothing(bundle: Path, tmp_path: Path) -> None:
    with open_bundle(bundle, device="cpu") as composer:
        merged = composer.compose(PROMPT, Request(weights={"animals": 1.0})).merged
        path = write_onnx_adapter(merged, tmp_path / "blend.onnx_adapter")
        before = path.read_bytes()
        with pytest.raises(MergeError, match="exists"):
            write_onnx_adapter(merged, path)
        assert path.read_bytes() == before
        with pytest.raises(MergeError, match="no adapter"):
            write_onnx_adapter(composer.compose(PROMPT, Request(weights={})).merged, tmp_path / "other")
        with pytest.raises(OSError):
            write_onnx_adapter(merged, path / "below")
