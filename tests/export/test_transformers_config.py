"""Configurations of transformers out of decoders: what cannot be said is refused, Llama 3's scaling recovered."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

from edgecompose.errors import ExportError
from edgecompose_export.decoder.config import DecoderConfig, Layer
from edgecompose_export.decoder.config_from_json import config_from_json
from edgecompose_export.decoder.config_to_json import config_to_json
from edgecompose_export.decoder.rotary import Rotary, llama3_scaling, rotary_from_config

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def decoder(kind: str, **fields: object) -> DecoderConfig:
    return config_from_json({"model_type": kind, **SIZES, **fields}, "tiny")


def test_mistral_under_the_name_of_llama_keeps_its_window() -> None:
    layers = tuple(Layer(17, 0) for _ in range(4))
    fields = config_to_json(dataclasses.replace(decoder("llama"), layers=layers), "tiny")
    assert (fields["model_type"], fields["sliding_window"]) == ("mistral", 17)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"attention_softcap": 30.0}, "attention_softcap"),
        ({"biases": frozenset({"q_proj", "k_proj", "v_proj"})}, "biases"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier"),
        ({"attention_scale": 0.5}, "attention_scale"),
        ({"rotaries": (Rotary(np.array([1.0] * 8, np.float32)),)}, "rotary frequencies"),
        ({"layers": (Layer(17, 0), *(Layer(None, 0),) * 3)}, "layers"),
    ],
)
def test_what_its_class_has_no_field_for_is_refused_by_name(change: dict[str, object], part: str) -> None:
    config = dataclasses.replace(decoder("llama"), **change)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=f"with its {part}; give the Hugging Face folder"):
        config_to_json(config, "tiny")


@given(
    theta=st.sampled_from([1e4, 5e5, 1e6]),
    pairs=st.sampled_from([16, 32, 64]),
    factor=st.sampled_from([2.0, 4.0, 8.0, 32.0]),
    high=st.sampled_from([2.0, 4.0, 6.0]),
    original=st.sampled_from([1024, 4096, 8192, 16384]),
)
def test_the_scaling_of_llama_3_is_recovered_from_its_divisors(
    theta: float, pairs: int, factor: float, high: float, original: int
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    plain = rotary_from_config(theta, 2 * pairs, None, context=131072).frequencies
    scaled = rotary_from_config(theta, 2 * pairs, scaling, context=131072).frequencies
    divisors = plain / scaled
    between = int(((divisors > 1.000001) & (divisors < factor * 0.999999)).sum())
    assume(between > 1 or high == 4.0)
    recovered = llama3_scaling(plain, divisors)
    assert recovered is not None
    again = rotary_from_config(theta, 2 * pairs, recovered, context=131072).frequencies
    assert np.allclose(again, scaled, rtol=1e-4)
    if between > 1:
        assert recovered == scaling


def test_other_divisors_are_no_scaling_of_llama_3() -> None:
    plain = rotary_from_config(1e4, 32, None, context=512).frequencies
    assert llama3_scaling(plain, np.ones(16, np.float32)) is None
    assert llama3_scaling(plain, np.linspace(8, 1, 16, dtype=np.float32)) is None
    assert llama3_scaling(plain, np.full(16, 0.5, np.float32)) is None
