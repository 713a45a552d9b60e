"""A decoder's configuration from the metadata of a GGUF model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgecompose.errors import ExportError
from edgecompose.formats.architectures import Architecture, gguf_architectures, with_windows
from edgecompose_export.decoder.config import (
    MOST_LAYERS,
    DecoderConfig,
    Layer,
    activation_of,
    is_positive,
    refuse_parts,
)
from edgecompose_export.decoder.rotary import Float, Rotary, llama3_scaling, longrope_scale, rotary_from_config


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], factors: Mapping[str, Float], name: str
) -> DecoderConfig:
    """Read the metadata of a GGUF model.

    Args:
        shapes: of all tensors, by name.
        factors: values of the tensors `rope_freqs`, `rope_factors_long`, `rope_factors_short` that it has.

    Raises:
        ExportError: the architecture, or a part of it, cannot be exported; the message names it.
    """
    kind = metadata.get("general.architecture")
    if metadata.get("general.type", "model") != "model":
        raise ExportError(f"'{name}' is a GGUF {metadata['general.type']!r:.40}, expected a model; give a base")
    rows = gguf_architectures()
    if not isinstance(kind, str) or kind not in rows:
        raise ExportError(
            f"base '{name}' has the GGUF architecture {kind!r:.40}, expected one of {', '.join(rows)}; give such a base"
        )
    fields = {k.removeprefix(f"{kind}."): v for k, v in metadata.items() if k.startswith(f"{kind}.")}
    if fields.get("expert_count"):
        raise ExportError(f"base '{name}' ({kind}) is a mixture of experts, which is not exported; give a dense model")
    try:
        return _from_metadata(rows[kind], fields, metadata=metadata, shapes=shapes, factors=factors)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ExportError(f"base '{name}': its metadata cannot be read: {reason}; convert it again") from error


def _from_metadata(
    row: Architecture,
    fields: Mapping[str, Any],
    *,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    factors: Mapping[str, Float],
) -> DecoderConfig:
    heads, hidden = _same_in_all_layers(fields["attention.head_count"]), int(fields["embedding_length"])
    head_size = int(fields.get("attention.key_length") or hidden // heads)
    if int(fields.get("attention.value_length") or head_size) != head_size:
        raise ExportError("keys and values of different length are not exported")
    count, context = int(fields["block_count"]), int(fields["context_length"])
    if not 1 <= count <= MOST_LAYERS:
        raise ExportError(f"block_count is {count}, expected 1 to {MOST_LAYERS}; convert it again")
    refuse_parts(row, fields)
    if "blk.0.attn_q_norm.weight" in shapes and row.query_key_norm == "none":
        raise ExportError(f"a {row.name} with norms of queries and keys is not exported")
    embedding = shapes["token_embd.weight"]
    epsilon = "attention.layer_norm_epsilon" if row.norm == "layer" else "attention.layer_norm_rms_epsilon"
    softcaps = {name: float(fields.get(name, default)) for name, default in row.softcaps.items()}
    factors_of = fields if row.multipliers else {}
    scale = float(factors_of.get("attention.scale") or 0)
    layers, rotaries = _gguf_layers(row, fields, factors, count=count, head_size=head_size, context=context)
    return DecoderConfig(
        architecture=row,
        vocabulary=int(embedding[0]),
        hidden=hidden,
        intermediate=_same_in_all_layers(fields["feed_forward_length"]),
        heads=heads,
        kv_heads=_same_in_all_layers(fields.get("attention.head_count_kv", heads)),
        head_size=head_size,
        context=context,
        layers=layers,
        rotaries=rotaries,
        epsilon=float(fields[epsilon]),
        activation=activation_of(row.defaults.get("hidden_activation") or row.defaults.get("hidden_act") or "silu"),
        tied="output.weight" not in shapes,
        biases=_gguf_biases(row, shapes),
        attention_scale=scale or _gguf_scale(row, hidden=hidden, heads=heads, head_size=head_size, layers=count),
        attention_softcap=softcaps.get("attn_logit_softcapping", 0.0),
        logit_softcap=softcaps.get("final_logit_softcapping", 0.0),
        embedding_multiplier=math.sqrt(hidden)
        if row.scaled_embedding
        else float(factors_of.get("embedding_scale") or 1),
        residual_multiplier=float(factors_of.get("residual_scale") or 1),
        logit_divisor=float(factors_of.get("logit_scale") or 1),
        parallel=row.may_be_parallel and "blk.0.ffn_norm.weight" not in shapes,
    )


def _same_in_all_layers(value: Any) -> int:
    """A number that a file may list for each layer; all layers must have the same."""
    numbers = set(value) if isinstance(value, list) else {value}
    if len(numbers) != 1:
        raise ExportError(f"layers of different widths ({sorted(numbers)}) are not exported")
    return int(numbers.pop())


def _gguf_scale(row: Architecture, *, hidden: int, heads: int, head_size: int, layers: int) -> float:
    """The attention scale, for which GGUF files have no field but Granite's."""
    return 1 / math.sqrt(hidden // heads if layers == row.wide_scale_layers else head_size)


def _gguf_biases(row: Architecture, shapes: Mapping[str, Sequence[int]]) -> frozenset[str]:
    return frozenset(m for m, name in row.gguf_paths.items() if f"blk.0.{name}.bias" in shapes)


def _gguf_layers(
    row: Architecture,
    fields: Mapping[str, Any],
    factors: Mapping[str, Float],
    *,
    count: int,
    head_size: int,
    context: int,
) -> tuple[tuple[Layer, ...], tuple[Rotary, ...]]:
    dimensions = int(fields.get("rope.dimension_count") or head_size)
    rotary = _gguf_rotary(fields, factors, dimensions=dimensions, context=context)
    window = fields.get("attention.sliding_window")
    windows: list[int | None] = [None] * count
    if window and row.full_every is not None:
        pattern = fields.get("attention.sliding_window_pattern", row.full_every)
        slides = pattern if isinstance(pattern, list) else [(i + 1) % int(pattern) != 0 for i in range(count)]
        windows = [int(window) if slide else None for slide in slides[:count]]
    elif window and with_windows(row) is not None:
        windows = [int(window)] * count
    if row.local_rotary:
        local = rotary_from_config(float(fields.get("rope.freq_base_swa", 10000.0)), dimensions, None, context=context)
        return tuple(Layer(w, 0 if w is None else 1) for w in windows), (rotary, local)
    every = row.unrotated_every or count + 1
    rotations = [None if (i + 1) % every == 0 else 0 for i in range(count)]
    return tuple(Layer(w, r) for w, r in zip(windows, rotations, strict=True)), (rotary,)


def _gguf_rotary(fields: Mapping[str, Any], factors: Mapping[str, Float], *, dimensions: int, context: int) -> Rotary:
    theta = float(fields.get("rope.freq_base", 10000.0))
    original = fields.get("rope.scaling.original_context_length")
    if "rope_factors_long" in factors:
        start = int(original or context)
        scaling = {
            "rope_type": "longrope",
            "short_factor": factors["rope_factors_short"].tolist(),
            "long_factor": factors["rope_factors_long"].tolist(),
            "attention_factor": fields.get("rope.scaling.attn_factor") or longrope_scale(context, start),
        }
        return rotary_from_config(theta, dimensions, scaling, context=context, original=start)
    linear = fields.get("rope.scaling.factor", fields.get("rope.scale_linear"))
    kind = str(fields.get("rope.scaling.type", "linear" if linear else "none"))  # as llama.cpp
    if kind == "longrope":
        raise ExportError("rope.scaling.type is longrope, but there is no rope_factors_long; convert it again")
    if kind not in ("none", "linear", "yarn"):
        raise ExportError(f"rope.scaling.type is {kind!r:.40}; none, linear, yarn and longrope can be exported")
    scaling = {"rope_type": kind, "factor": linear, "original_max_position_embeddings": original}
    if kind == "yarn":
        scaling |= {
            "beta_fast": fields.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": fields.get("rope.scaling.yarn_beta_slow"),
            "attention_factor": fields.get("rope.scaling.yarn_attn_factor"),
        }
    unscaled = kind == "none" or linear in (None, 0, 1)
    rotary = rotary_from_config(theta, dimensions, None if unscaled else scaling, context=context)
    rotary = dataclasses.replace(rotary, scale=rotary.scale * float(fields.get("rope.scaling.attn_factor") or 1))
    if not is_positive(rotary.scale):
        raise ExportError(
            f"rope.scaling.attn_factor gives the scale {rotary.scale}, expected a positive number; convert it again"
        )
    if "rope_freqs" not in factors:
        return rotary
    divisors = np.asarray(factors["rope_freqs"], np.float32)  # Llama 3
    if len(divisors) != rotary.pairs:
        raise ExportError(f"rope_freqs has {len(divisors)} entries, expected {rotary.pairs}; convert it again")
    if not (np.isfinite(divisors).all() and divisors.min() > 0):
        raise ExportError("rope_freqs holds numbers that are not positive; convert it again")
    llama3 = llama3_scaling(rotary.frequencies, divisors) or rotary.scaling
    return dataclasses.replace(rotary, frequencies=rotary.frequencies / divisors, scaling=llama3)
