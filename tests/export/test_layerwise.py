"""Distances between models are what their formulas say, though no vocabulary is ever whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

import torch
import transformers

from edgecompose_export.calibration import logits as calibration_logits
from edgecompose_export.calibration.comparison import compare, divergences
from edgecompose_export.calibration.logits import float_logits
from edgecompose_export.calibration.reference import LARGEST, FloatBlocks, embedded, float_states
from edgecompose_export.weights.source import open_weights
from tests import gguf_models

Double = npt.NDArray[np.float64]


def log_probabilities(logits: npt.NDArray[np.floating]) -> Double:
    values = logits.astype(np.float64)
    top = values.max(-1, keepdims=True)
    return np.asarray(values - top - np.log(np.exp(values - top).sum(-1, keepdims=True)))


@given(
    seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 39), max_size=4), scale=st.sampled_from([0.1, 3.0, 50.0])
)
def test_a_comparison_in_chunks_is_the_formula_of_the_whole(seed: int, cuts: list[int], scale: float) -> None:
    rng = np.random.default_rng(seed)
    one = (rng.normal(size=(6, 40)) * scale).astype(np.float32)
    other = (one + rng.normal(size=(6, 40)) * 0.3).astype(np.float32)
    following = [*map(int, rng.integers(0, 40, 5)), -1]
    ends = [0, *sorted(set(cuts)), 40]
    chunks = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    ours = compare([one[:, c] for c in chunks], [other[:, c] for c in chunks], following)
    p, q = log_probabilities(one), log_probabilities(other)
    assert ours.kl == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), rel=1e-4, abs=1e-6)
    assert ours.top1 == float((p.argmax(-1) == q.argmax(-1)).mean())
    for value, logs in ((ours.nll, p), (ours.nll_other, q)):
        assert value == pytest.approx(-float(np.mean([logs[i, t] for i, t in enumerate(following[:-1])])), rel=1e-4)
    assert ours.positions == 6


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "phi3"])
def test_states_block_by_block_end_in_the_logits_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_logits, "_LOGITS", 1)  # so that the vocabulary comes in several chunks
    monkeypatch.setattr(calibration_logits, "_FEWEST_ROWS", 1 << 6)
    folder = gguf_models.MODELS[name].write(tmp_path / "source")
    source = open_weights(folder)
    prompts = [
        [int(t) for t in np.random.default_rng(i).integers(0, 290, length)] for i, length in enumerate((60, 1, 7))
    ]
    reference = float_states(source, prompts)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    for states, prompt in zip(reference.states, prompts, strict=True):
        chunks = list(float_logits(source, states))
        assert len(chunks) > 1
        with torch.no_grad():
            exact = model(torch.tensor([prompt])).logits[0].numpy()
        assert np.abs(np.concatenate(chunks, -1) - exact).max() < 1e-4 * np.abs(exact).max()


def test_divergences_of_several_models_are_those_of_each(tmp_path: Path) -> None:
    source = open_weights(gguf_models.MODELS["gemma2"].write(tmp_path / "source"))
    rng = np.random.default_rng(4)
    reference = rng.normal(size=(9, 64)).astype(np.float32)
    others = (reference + rng.normal(size=(3, 9, 64)) * 0.1).astype(np.float32)
    exact = log_probabilities(np.concatenate(list(float_logits(source, reference)), -1))
    values = []
    for other in others:
        logs = log_probabilities(np.concatenate(list(float_logits(source, other)), -1))
        values.append(float((np.exp(exact) * (exact - logs)).sum(-1).mean()))
    assert divergences(source, reference, others) == pytest.approx(values, rel=1e-3)


def test_the_largest_query_key_or_value_is_seen(tmp_path: Path) -> None:
    source = open_weights(gguf_models.MODELS["llama"].write(tmp_path / "source"))
    blocks, stream = FloatBlocks(source), embedded(source, [1, 2, 3])
    weights = blocks.load(0)
    first = float(blocks.run(0, weights, stream, taps=True)[1][LARGEST])
    weights["0.v_proj.weight"] = weights["0.v_proj.weight"] * np.float32(1000)
    assert float(blocks.run(0, weights, stream, taps=True)[1][LARGEST]) > 50 * first
