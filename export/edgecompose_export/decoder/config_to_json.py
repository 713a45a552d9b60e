"""A decoder as a config.json of transformers 4.57: the inverse of `config_from_json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgecompose.errors import ExportError
from edgecompose.formats.architectures import ALWAYS, Architecture, with_windows
from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.decoder.config_from_json import config_from_json
from edgecompose_export.decoder.rotary import Rotary

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def config_to_json(config: DecoderConfig, name: str) -> dict[str, Any]:
    """The configuration with which transformers computes the same as the decoder.

    Args:
        name: of the base in messages.

    Raises:
        ExportError: transformers' class has no field for a part of the decoder; the message names the part.
    """
    row = config.architecture
    windows = {layer.window for layer in config.layers} - {None}
    written = (
        with_windows(row) if windows and row.windows == "layer_types" else None
    ) or row  # Mistral is called llama
    fields: dict[str, Any] = {
        "architectures": [written.model_class],
        "model_type": written.name,
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
        "sliding_window": max((w for w in windows if w), default=None),
        "layer_norm_eps" if row.norm == "layer" else "rms_norm_eps": config.epsilon,
        "hidden_activation" if "hidden_activation" in row.defaults else "hidden_act": _ACTIVATIONS[config.activation],
    }
    if config.head_size * config.heads != config.hidden or "head_dim" in row.defaults:
        fields["head_dim"] = config.head_size
    fields |= _rotary_fields(config) | _own_fields(config) | _bias_fields(config)
    _check(config, config_from_json(fields, name), name)
    return fields


def _rotary_fields(config: DecoderConfig) -> dict[str, Any]:
    first = config.rotaries[0]
    fields: dict[str, Any] = {"rope_theta": first.theta, "rope_scaling": _plain(first.scaling)}
    if 2 * first.pairs != config.head_size:
        fields["partial_rotary_factor"] = 2 * first.pairs / config.head_size
    if config.architecture.longrope:
        fields["original_max_position_embeddings"] = first.long_from or config.context
        if first.scaling is not None:  # its class allows these three fields only
            lists = {name: list(first.scaling[name]) for name in ("short_factor", "long_factor")}
            fields["rope_scaling"] = {"type": "longrope", **lists}
    if config.architecture.local_rotary:
        fields["rope_local_base_freq"] = config.rotaries[1].theta
    return fields


def _plain(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if scaling is None else {key: value for key, value in scaling.items() if value is not None}


def _own_fields(config: DecoderConfig) -> dict[str, Any]:
    """Fields of some architectures only."""
    row, layers = config.architecture, config.layers
    fields: dict[str, Any] = {}
    kinds = ["full_attention" if layer.window is None else "sliding_attention" for layer in layers]
    if row.full_every is not None:
        fields |= {
            "layer_types": kinds,
            "query_pre_attn_scalar": _whole(config.attention_scale**-2),
            "attn_logit_softcapping": config.attention_softcap or None,
            "final_logit_softcapping": config.logit_softcap or None,
        }
    if row.windows == "optional":
        slides = "sliding_attention" in kinds
        fields |= {"use_sliding_window": slides} | ({"layer_types": kinds} if slides else {})
    if row.unrotated_every is not None:
        fields["no_rope_layers"] = [int(layer.rotary is not None) for layer in layers]
    if row.multipliers:
        fields |= {
            "attention_multiplier": config.attention_scale,
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "logits_scaling": config.logit_divisor,
        }
    if row.may_be_parallel:
        fields["use_parallel_residual"] = config.parallel
    if row.rotary_part != 1:
        fields["partial_rotary_factor"] = 2 * config.rotaries[0].pairs / config.head_size
    return fields


def _bias_fields(config: DecoderConfig) -> dict[str, Any]:
    biases = config.architecture.biases.items()
    return {name: modules[0] in config.biases for name, modules in biases if name != ALWAYS}


def _whole(value: float) -> float:
    """The whole number next to a value that float32 arithmetic has moved a little, else the value."""
    return round(value) if abs(value - round(value)) < 1e-3 else value


def _check(config: DecoderConfig, again: DecoderConfig, name: str) -> None:
    """Check that a configuration, read again, describes the decoder that it was written for."""
    different = [
        f.name
        for f in dataclasses.fields(config)
        if f.name not in ("architecture", "rotaries") and not _same(getattr(config, f.name), getattr(again, f.name))
    ]
    if not _same_blocks(config.architecture, again.architecture):
        different.append("architecture")
    if len(config.rotaries) != len(again.rotaries) or not all(map(_same_rotary, config.rotaries, again.rotaries)):
        different.append("rotary frequencies")
    if different:
        raise ExportError(
            f"base '{name}': transformers has no configuration of {again.architecture.model_class} with its "
            f"{', '.join(different)}; give the Hugging Face folder that it was converted from"
        )


def _same_blocks(one: Architecture, other: Architecture) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("norm", "norms", "query_key_norm", "paths"))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return bool(abs(one - other) <= 1e-6 * max(abs(one), abs(other)))
    return bool(one == other)


def _same_rotary(one: Rotary, other: Rotary) -> bool:
    pairs = [(one.frequencies, other.frequencies)]
    if one.long_frequencies is not None and other.long_frequencies is not None:
        pairs.append((one.long_frequencies, other.long_frequencies))
    return bool(
        one.pairs == other.pairs
        and one.long_from == other.long_from
        and _same(one.scale, other.scale)
        and all(np.allclose(a, b, rtol=1e-4, atol=0) for a, b in pairs)
    )
