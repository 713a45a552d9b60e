"""A decoder's configuration from a Hugging Face config.json (transformers 4 or 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgecompose.errors import ExportError
from edgecompose.formats.architectures import ALWAYS, ARCHITECTURES, Architecture
from edgecompose_export.decoder.config import MOST_LAYERS, DecoderConfig, Layer, activation_of, refuse_parts
from edgecompose_export.decoder.rotary import Rotary, rotary_from_config

#: Fields of a configuration that name parts which cannot be exported, and what each part is.
_FOREIGN_PARTS = (
    ("text_config", "a wrapper of a text model with other parts (vision, audio)"),
    ("vision_config", "a vision encoder"),
    ("num_local_experts", "a mixture of experts"),
    ("num_experts", "a mixture of experts"),
    ("n_routed_experts", "a mixture of experts"),
    ("kv_lora_rank", "multi-head latent attention"),
)
#: Optional fields of a configuration that are objects, and those that are lists.
_OBJECTS = ("quantization_config", "rope_scaling", "rope_parameters")
_LISTS = ("architectures", "layer_types", "no_rope_layers")


def config_from_json(config: Mapping[str, Any], name: str) -> DecoderConfig:
    """Read a Hugging Face configuration (config.json of transformers 4 or 5).

    Args:
        name: of the base in messages.

    Raises:
        ExportError: the architecture, or a part of it, cannot be exported; the message names it.
    """
    for key in (*_OBJECTS, *_LISTS):
        kind, word = (Mapping, "an object") if key in _OBJECTS else (list, "a list")
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise ExportError(
                f"base '{name}': config.json: {key} is {value!r:.40}, expected {word}; copy config.json again"
            )
    row = _row(config, name)
    fields = {**row.defaults, **{key: value for key, value in config.items() if value is not None}}
    if config.get("sliding_window", 0) is None:  # Mistral from 0.3 on: no window, which is not its default
        fields.pop("sliding_window", None)
    explicit = {**row.defaults, **config}
    try:
        return _from_fields(row, fields, explicit)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ExportError(f"base '{name}': config.json cannot be read: {reason}; copy it again") from error


def _row(config: Mapping[str, Any], name: str) -> Architecture:
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "unnamed")
        raise ExportError(f"base '{name}' is quantised ({method}); give the float base, or a GGUF file of it")
    if config.get("quantization"):
        raise ExportError(f"base '{name}' is quantised (mlx); give the float base, or a GGUF file of it")
    kind, classes = config.get("model_type"), config.get("architectures") or []
    for key, part in _FOREIGN_PARTS:
        value = config.get(key)
        if value and not (isinstance(value, int) and value <= 1 and key.startswith("num_")):
            raise ExportError(
                f"base '{name}' ({kind}) has {part} ({key}), which is not exported; give a dense text model"
            )
    row = ARCHITECTURES.get(str(kind)) or next(
        (r for r in ARCHITECTURES.values() if r.aliases and (kind in r.aliases or r.model_class in classes)), None
    )
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise ExportError(f"base '{name}' has the architecture {kind!r:.40}, expected one of {known}; give such a base")
    if classes and row.model_class not in classes:
        raise ExportError(
            f"base '{name}' is a {', '.join(map(str, classes))}, expected {row.model_class}: only causal "
            "language models can be exported"
        )
    return row


def _from_fields(row: Architecture, fields: Mapping[str, Any], explicit: Mapping[str, Any]) -> DecoderConfig:
    heads, hidden = _size(fields, "num_attention_heads"), _size(fields, "hidden_size")
    count = _size(fields, "num_hidden_layers", MOST_LAYERS)
    head_size = _size(fields, "head_dim") if fields.get("head_dim") else hidden // heads
    activation = fields.get("hidden_activation") if "hidden_activation" in row.defaults else fields.get("hidden_act")
    context = _size(fields, "max_position_embeddings")
    layers, rotaries = _layers_and_rotaries(row, fields, count=count, head_size=head_size, context=context)
    refuse_parts(row, fields)
    inner = _size(fields, "shared_intermediate_size" if row.hybrid else "intermediate_size")
    kv_heads = _size(fields, "num_key_value_heads") if fields.get("num_key_value_heads") else heads
    epsilon = _number(fields, *(("layer_norm_eps", 1e-5) if row.norm == "layer" else ("rms_norm_eps", 1e-6)))
    scale = 1 / math.sqrt(_number(fields, "query_pre_attn_scalar", head_size) or head_size)
    factors = fields if row.multipliers else {}
    embedding = math.sqrt(hidden) if row.scaled_embedding else _number(factors, "embedding_multiplier", 1.0)
    return DecoderConfig(
        architecture=row,
        vocabulary=_size(fields, "vocab_size"),
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        context=context,
        layers=layers,
        rotaries=rotaries,
        epsilon=epsilon,
        activation=activation_of(activation or "silu"),
        tied=bool(fields.get("tie_word_embeddings", False)),
        biases=_biases(row, fields),
        attention_scale=_number(fields, "attention_multiplier", 1.0) if row.multipliers else scale,
        attention_softcap=_number(explicit, "attn_logit_softcapping", 0.0),
        logit_softcap=_number(explicit, "final_logit_softcapping", 0.0),
        embedding_multiplier=embedding,
        residual_multiplier=_number(factors, "residual_multiplier", 1.0),
        logit_divisor=_number(factors, "logits_scaling", 1.0),
        parallel=row.may_be_parallel and bool(fields.get("use_parallel_residual")),
    )


def _size(fields: Mapping[str, Any], name: str, most: int = 2**31 - 1) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or not 1 <= value <= most:
        raise ExportError(f"config.json: {name} is {value!r:.40}, expected a whole number from 1 to {most}")
    return int(value)


def _number(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExportError(f"config.json: {name} is {value!r:.40}, expected a number; copy config.json again")
    return float(value)


def _biases(row: Architecture, fields: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(m for name, modules in row.biases.items() if name == ALWAYS or fields.get(name) for m in modules)


def _layers_and_rotaries(
    row: Architecture, fields: Mapping[str, Any], *, count: int, head_size: int, context: int
) -> tuple[tuple[Layer, ...], tuple[Rotary, ...]]:
    windows = _windows(row, fields, count)
    dimensions = int(head_size * _rotary_part(row, fields))
    original = fields.get("original_max_position_embeddings") if row.longrope else None
    parameters = fields.get("rope_parameters") or {}
    nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    scaling = fields.get("rope_scaling") or (None if nested else parameters) or None
    theta = float(fields.get("rope_theta") or (scaling or {}).get("rope_theta") or 10000.0)
    if row.longrope and scaling and scaling.get("type", scaling.get("rope_type")) == "yarn":
        scaling = {**scaling, "type": "longrope", "rope_type": "longrope"}
    if nested:
        scaling = nested.get("full_attention", {})
        theta = float(scaling.get("rope_theta") or theta)
    shared = rotary_from_config(theta, dimensions, scaling, context=context, original=original)
    if row.local_rotary:
        local = float(nested.get("sliding_attention", {}).get("rope_theta") or fields["rope_local_base_freq"])
        rotaries = (shared, rotary_from_config(local, dimensions, None, context=context))
        return tuple(Layer(w, 0 if w is None else 1) for w in windows), rotaries
    return tuple(Layer(w, r) for w, r in zip(windows, _rotated_layers(row, fields, count), strict=True)), (shared,)


def _rotary_part(row: Architecture, fields: Mapping[str, Any]) -> float:
    nested = fields.get("rope_parameters") or {}
    return float(fields.get("partial_rotary_factor", nested.get("partial_rotary_factor", row.rotary_part)))


def _rotated_layers(row: Architecture, fields: Mapping[str, Any], count: int) -> list[int | None]:
    """The index of the rotation of each layer, None for layers without positions."""
    if row.hybrid:
        return [0 if fields.get("position_embedding_type") == "rope" else None] * count
    if row.unrotated_every is None:
        return [0] * count
    every = int(fields["no_rope_layer_interval"])
    flags = fields.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(count)]
    if len(flags) != count:
        raise ExportError(f"no_rope_layers has {len(flags)} entries, expected {count}; copy config.json again")
    return [0 if flag else None for flag in flags]


def _windows(row: Architecture, fields: Mapping[str, Any], count: int) -> list[int | None]:
    """The attention window of each layer in tokens, None for all tokens."""
    kinds = fields.get("layer_types")
    if row.hybrid:
        if not kinds or set(kinds) != {"attention"} or len(kinds) != count:
            raise ExportError("a hybrid with Mamba layers is not exported (layer_types); give a dense model")
        return [None] * count
    window = fields.get("sliding_window")
    if row.windows == "all":
        return [None if window is None else int(window)] * count
    if row.windows == "optional" and not fields.get("use_sliding_window"):
        return [None] * count
    if kinds is None:
        kinds = _usual_kinds(row, fields, count)
    if len(kinds) != count or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ExportError(
            f"layer_types is {sorted(set(map(str, kinds)))} for {len(kinds)} of {count} layers, expected "
            "full_attention or sliding_attention for each; other kinds of layers are not exported"
        )
    if window is None and "sliding_attention" in kinds:
        raise ExportError("layer_types names sliding_attention, but there is no sliding_window; copy config.json again")
    return [int(window or 0) if kind == "sliding_attention" else None for kind in kinds]


def _usual_kinds(row: Architecture, fields: Mapping[str, Any], count: int) -> list[str]:
    """The kinds of layers where `layer_types` is not there."""
    if row.full_every is not None:
        every = int(fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", row.full_every)))
        slides = [(i + 1) % every != 0 for i in range(count)]
    elif row.unrotated_every is not None:
        slides = [rotary is None for rotary in _rotated_layers(row, fields, count)]
    elif row.windows == "optional":
        slides = [i >= int(fields.get("max_window_layers", 28)) for i in range(count)]
    else:
        slides = [False] * count
    return ["sliding_attention" if slide else "full_attention" for slide in slides]
