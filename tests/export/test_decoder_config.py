"""A configuration means what transformers builds of it, and whatever stands in its place is refused by name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

import transformers

from edgecompose.errors import ExportError
from edgecompose.formats.architectures import ARCHITECTURES, PACKED
from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.decoder.config_from_json import config_from_json
from tests import tiny
from tests.export.configurations import VALUES, check_is_whole, linear

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
#: What a configuration cannot do without, beside SIZES.
MORE: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        "shared_intermediate_size": 96,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["attention"] * 8,
    },
}
#: Settings that change what a model is built of, by architecture.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in ARCHITECTURES),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "hidden_act": "gelu"}),
    ("llama", {"rope_theta": 5e5, "rms_norm_eps": 1e-3, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 17, "head_dim": 32}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 3}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 3, "attention_bias": True}),
    ("gemma2", {"query_pre_attn_scalar": 144, "sliding_window": 17, "head_dim": 32}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3_text", {"query_pre_attn_scalar": 144, "sliding_window": 17, "rope_local_base_freq": 5e3}),
    ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 17}),
    ("olmo2", {"attention_bias": True}),
    ("granite", {"attention_multiplier": 0.5, "residual_multiplier": 0.3, "embedding_multiplier": 7.0}),
    ("granite", {"logits_scaling": 3.0, "mlp_bias": True}),
    ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-3}),
    ("stablelm", {"use_parallel_residual": True}),
    ("smollm3", {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 17}),
)


def fields_of(name: str, **changes: Any) -> dict[str, Any]:
    """A config.json that leaves out what it may."""
    classes = [ARCHITECTURES[name].model_class]
    return {"model_type": name, "architectures": classes, **SIZES, **MORE.get(name, {}), **changes}


def built(name: str, changes: dict[str, Any]) -> Any:
    """What transformers builds of the same fields."""
    config_class, model_class, _ = tiny.ARCHITECTURES[name]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, config_class)(**{**SIZES, **special, **MORE.get(name, {}), **changes})
    return getattr(transformers, model_class)(config)


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_what_is_read_is_what_transformers_builds(name: str, changes: dict[str, Any]) -> None:
    config, model = config_from_json(fields_of(name, **changes), "tiny"), built(name, changes)
    assert (config.vocabulary, config.hidden) == tuple(model.model.embed_tokens.weight.shape)
    assert config.tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert len(config.layers) == len(model.model.layers)
    for ours, layer in zip(config.layers, model.model.layers, strict=True):
        attention = layer.self_attn
        for module, path in ARCHITECTURES[name].paths.items():
            exact = linear(layer, module, path)
            assert config.widths[module] == tuple(exact.weight.shape), module
            parts = PACKED.get(module, (module,))
            assert {part in config.biases for part in parts} == {exact.bias is not None}, module
        assert config.attention_scale == pytest.approx(getattr(attention, "scaling", config.head_size**-0.5))
        window = getattr(attention, "sliding_window", None)
        if name in ("mistral", "phi3"):
            window = model.config.sliding_window
        assert ours.window == (window or None)
        if name == "smollm3":
            assert (ours.rotary is not None) == bool(attention.use_rope)
    norm, row = model.model.norm, config.architecture
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    assert config.epsilon == pytest.approx(epsilon)
    emb = model.model.rotary_emb
    if emb is not None:
        assert np.allclose(config.rotaries[0].frequencies, emb.inv_freq.numpy(), rtol=2e-6)
    if name == "gemma3_text":
        assert np.allclose(config.rotaries[1].frequencies, model.model.rotary_emb_local.inv_freq.numpy(), rtol=2e-6)
    for value, field in (
        (config.embedding_multiplier if not name.startswith("gemma") else 1.0, "embedding_multiplier"),
        (config.residual_multiplier, "residual_multiplier"),
        (config.logit_divisor, "logits_scaling"),
    ):
        assert value == getattr(model.config, field, 1.0)
    assert config.attention_softcap == (getattr(model.config, "attn_logit_softcapping", None) or 0)
    assert config.logit_softcap == (getattr(model.config, "final_logit_softcapping", None) or 0)
    assert config.parallel == bool(getattr(model.config, "use_parallel_residual", False))
    assert row.name == name


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_fields_that_are_left_out_have_the_defaults_of_transformers(name: str, changes: dict[str, Any]) -> None:
    short = fields_of(name, **changes)
    whole = json.loads(built(name, changes).config.to_json_string(use_diff=False)) | {"architectures": None}
    assert len(whole) > len(short)
    assert same(config_from_json(short, "tiny"), config_from_json(whole, "tiny"))


def same(one: DecoderConfig, other: DecoderConfig) -> bool:
    names = [field.name for field in dataclasses.fields(one) if field.name != "rotaries"]
    fields = [{name: getattr(config, name) for name in names} for config in (one, other)]
    turns = [[rotary.frequencies.tolist() for rotary in config.rotaries] for config in (one, other)]
    return fields[0] == fields[1] and turns[0] == turns[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "llama"}}, r"a wrapper of a text model with other parts .*\(text_config\)"),
        ({"vision_config": {"depth": 2}}, r"has a vision encoder \(vision_config\)"),
        ({"num_local_experts": 8}, r"has a mixture of experts \(num_local_experts\)"),
        ({"num_experts": 8}, r"has a mixture of experts \(num_experts\)"),
        ({"n_routed_experts": 8}, r"has a mixture of experts \(n_routed_experts\)"),
        ({"kv_lora_rank": 512}, r"has multi-head latent attention \(kv_lora_rank\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is quantised \(gptq\); give the float base"),
        ({"quantization_config": {"quant_method": "awq"}}, r"is quantised \(awq\)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"is quantised \(bitsandbytes\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantised \(fp8\)"),
        ({"quantization_config": {}}, r"is quantised \(unnamed\)"),
        ({"model_type": "gpt2"}, "has the architecture 'gpt2', expected one of llama, .*; give such a base"),
        ({"model_type": None}, "has the architecture None"),
        ({"model_type": ["llama"]}, r"has the architecture \['llama'\]"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM: only causal"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "the type 'spiral', expected one of default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is None, expected a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a list"),
        ({"hidden_act": "relu2"}, "the activation 'relu2' is not exported; silu"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
        ({"hidden_size": 64.5}, r"hidden_size is 64\.5, expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number from 1"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to 4096"),
        ({"head_dim": 10**9}, "1000000000 values of a head rotate, expected an even number"),
        ({"partial_rotary_factor": 2}, "32 values of a head rotate, expected at most 16"),
        ({"head_dim": 15}, "15 values of a head rotate, expected an even number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a number"),
        ({"rms_norm_eps": float("nan")}, "epsilon nan, expected positive numbers"),
        ({"rope_theta": -1.0}, r"rope_theta is -1\.0, expected a positive number"),
    ],
    ids=str,
)
def test_what_is_not_exported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        config_from_json(fields_of("llama") | changes, "tiny")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("granitemoehybrid", {"layer_types": ["mamba"] * 8}, "a hybrid with Mamba layers is not exported"),
        ("granitemoehybrid", {"layer_types": None}, "a hybrid with Mamba layers is not exported"),
        ("stablelm", {"qk_layernorm": True}, r"a stablelm with a LayerNorm .* is not exported \(qk_layernorm\)"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 8}, "layer_types is .*chunked_attention.*not exported"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "for 3 of 8 layers"),
        ("gemma2", {"sliding_window": -5}, "a layer attends to -5 tokens"),
        ("gemma2", {"query_pre_attn_scalar": -144}, "math domain error|expected"),
        ("mistral", {"sliding_window": 0}, "a layer attends to 0 tokens"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries, expected 8"),
        ("granite", {"logits_scaling": 0}, "logit_divisor 0.0, expected positive numbers"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": "1" * 8, "long_factor": [1] * 8}},
            "short_factor has no list entries",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [[1.0]] * 8, "long_factor": [1] * 8}},
            "short_factor holds values that are not positive numbers",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": [0] * 8}},
            "long_factor holds values that are not positive numbers",
        ),
    ],
    ids=str,
)
def test_what_an_architecture_may_not_have_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        config_from_json(fields_of(name) | changes, "tiny")


def test_a_field_that_is_null_is_no_quantisation() -> None:
    assert config_from_json(fields_of("llama", quantization_config=None), "tiny").hidden == 64


OPTIONAL = (
    "architectures",
    "attention_bias",
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "kv_lora_rank",
    "layer_norm_eps",
    "layer_types",
    "logits_scaling",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "position_embedding_type",
    "quantization_config",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "shared_intermediate_size",
    "sliding_window",
    "sliding_window_pattern",
    "text_config",
    "tie_word_embeddings",
    "use_parallel_residual",
    "use_qkv_bias",
    "use_sliding_window",
)


@pytest.mark.parametrize("name", ARCHITECTURES)
@given(changes=st.dictionaries(st.sampled_from((*SIZES, *OPTIONAL)), VALUES, min_size=1, max_size=2))
@settings(max_examples=60)
def test_any_value_of_any_field_is_read_or_refused(name: str, changes: dict[str, Any]) -> None:
    try:
        config = config_from_json(fields_of(name) | changes, "tiny")
    except ExportError as error:
        assert str(error)
        return
    check_is_whole(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
@given(data=st.data())
def test_a_field_that_is_missing_has_a_default_or_is_named(name: str, data: st.DataObject) -> None:
    fields = fields_of(name)
    left_out = data.draw(st.sampled_from(sorted(set(fields) - {"architectures"})))
    del fields[left_out]
    try:
        check_is_whole(config_from_json(fields, "tiny"))
    except ExportError as error:
        assert left_out in str(error) or (left_out == "model_type" and "architecture None" in str(error))
