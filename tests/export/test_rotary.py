"""Inverse frequencies of every kind of scaling are those of transformers; numbers that make none are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from edgecompose.errors import ExportError
from edgecompose_export.decoder.rotary import SCALINGS, rotary_from_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3-32": {**LLAMA3, "factor": 32.0},
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-factor": {**YARN, "attention_factor": 1.25},
    "yarn-mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn-exact": {**YARN, "truncate": False},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1 + i / 9 for i in range(32)],
        "long_factor": [2.0 + i for i in range(32)],
        "original_max_position_embeddings": 32768,
    },
}


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name: str, theta: float) -> None:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=32768,
        rope_theta=theta,
        rope_scaling=dict(CASES[name]),
    )
    exact, scale = ROPE_INIT_FUNCTIONS[CASES[name]["rope_type"]](config, device="cpu")
    ours = rotary_from_config(theta, 64, CASES[name], context=32768)
    assert np.allclose(ours.frequencies, exact.numpy(), rtol=2e-6)
    assert ours.scale == pytest.approx(scale)
    assert (ours.theta, ours.scaling) == (theta, CASES[name])


def test_long_frequencies_are_those_of_transformers_beyond_the_original_context() -> None:
    scaling = {"type": "longrope", **{k: CASES["longrope"][k] for k in ("short_factor", "long_factor")}}
    config = Phi3Config(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling=dict(scaling),
        pad_token_id=0,
    )
    ours = rotary_from_config(1e4, 64, scaling, context=131072, original=4096)
    assert ours.long_from == 4096 and ours.long_frequencies is not None
    for length, frequencies in ((4096, ours.frequencies), (4097, ours.long_frequencies)):
        exact, scale = ROPE_INIT_FUNCTIONS["longrope"](config, device="cpu", seq_len=length)
        assert np.allclose(frequencies, exact.numpy(), rtol=2e-6)
        assert ours.scale == pytest.approx(scale)


def test_a_scaling_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="has the type 'spiral', expected one of default, linear"):
        rotary_from_config(1e4, 64, {"rope_type": "spiral"}, context=512)


@given(
    kind=st.sampled_from([k for k in SCALINGS if k not in ("default", "dynamic")]),
    value=st.one_of(st.none(), st.text(max_size=3), st.booleans(), st.just(-1.0), st.just(float("nan")), st.just(0)),
)
def test_numbers_that_are_none_are_refused(kind: str, value: Any) -> None:
    scaling = {"rope_type": kind, "short_factor": [1.0] * 32, "long_factor": [1.0] * 32} | LLAMA3 | {"rope_type": kind}
    field = "short_factor" if kind == "longrope" else "factor"
    with pytest.raises(ExportError, match=f"rope_scaling: {field} "):
        rotary_from_config(1e4, 64, {**scaling, field: value}, context=512)
