"""Values for fields of configurations, and checks of the decoders that they give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")


from edgecompose.formats.architectures import ARCHITECTURES, MODULES
from edgecompose_export.decoder.config import DecoderConfig


def linear(layer: Any, name: str, path: str) -> Any:
    """The linear module at a path of a layer."""
    module = layer
    for part in path.split("."):
        module = getattr(module, part)
    return module


NUMBERS = st.one_of(
    st.integers(-2, 9),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from([10**9, 10**12, 1e38, 1e300, 0.5, True, False]),
)
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su", "spiral")
SCALINGS = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(KINDS)},
    optional={
        name: st.one_of(NUMBERS, st.none(), st.text(max_size=2))
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "truncate",
            "rope_theta",
            "partial_rotary_factor",
        )
    }
    | {name: st.lists(NUMBERS, min_size=8, max_size=8) for name in ("short_factor", "long_factor")},
)
WORDS = st.one_of(st.text(max_size=4), st.sampled_from((*KINDS, *ARCHITECTURES, "silu", "full_attention")))
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, WORDS, SCALINGS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=8),
        st.dictionaries(st.sampled_from(["rope_theta", "full_attention", "sliding_attention", "quant_method"]), inner),
    ),
    max_leaves=6,
)


def check_is_whole(config: DecoderConfig) -> None:
    """Every number of a configuration can stand in a graph."""
    numbers = [
        config.epsilon,
        config.attention_scale,
        config.attention_softcap,
        config.logit_softcap,
        config.embedding_multiplier,
        config.residual_multiplier,
        config.logit_divisor,
    ]
    assert np.isfinite(np.array(numbers, np.float32)).all() and min(numbers) >= 0
    assert config.heads % config.kv_heads == 0 and set(config.widths) >= set(MODULES)
    assert min(min(shape) for shape in config.widths.values()) > 0
    for layer in config.layers:
        assert layer.window is None or layer.window > 0
        assert layer.rotary is None or 0 <= layer.rotary < len(config.rotaries)
    for rotary in config.rotaries:
        assert 0 < 2 * rotary.pairs <= config.head_size
        for frequencies in (rotary.frequencies, rotary.long_frequencies):
            assert frequencies is None or (np.isfinite(frequencies).all() and frequencies.min() > 0)
        assert np.isfinite(np.float32(rotary.scale))
