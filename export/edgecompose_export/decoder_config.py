"""What a base's decoder is: read from a Hugging Face config.json or from the metadata of a GGUF file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgecompose.errors import ExportError
from edgecompose.formats.architectures import ARCHITECTURES, PACKED, Architecture, gguf_architectures
from edgecompose_export.rotary import Float, Rotary, llama3_scaling, longrope_scale, rotary_from_config

Activation = Literal["silu", "gelu", "gelu_tanh"]
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip
#: Fields of a configuration that stand for parts which are not exported, by what they are.
_FOREIGN_PARTS = (
    ("text_config", "a wrapper of a text model with other parts (vision, audio)"),
    ("vision_config", "a vision encoder"),
    ("num_local_experts", "a mixture of experts"),
    ("num_experts", "a mixture of experts"),
    ("n_routed_experts", "a mixture of experts"),
    ("kv_lora_rank", "multi-head latent attention"),
)
#: Fields of a configuration that are objects or lists, where they are there.
_OBJECTS = ("quantization_config", "rope_scaling", "rope_parameters")
_LISTS = ("architectures", "layer_types", "no_rope_layers")
_MOST_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Layer:
    """One block: how many tokens it attends to (None for all, else the newest ones), and which rotation it has."""

    window: int | None
    rotary: int | None


@dataclass(frozen=True, slots=True, eq=False)
class DecoderConfig:
    """A decoder, as its graph needs it.

    Attributes:
        architecture: the row of the table.
        context: largest number of tokens.
        rotaries: rotations that layers point to.
        tied: embedding and output layer are the same weights.
        biases: linear modules that have one.
        attention_scale: factor of the products of queries and keys.
        attention_softcap, logit_softcap: c in c tanh(x / c), 0 for none.
        embedding_multiplier, residual_multiplier, logit_divisor: factors of embeddings and of what is added to the
            stream, and what logits are divided by.
        parallel: attention and MLP read the same norm and are added together.
    """

    architecture: Architecture
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    layers: tuple[Layer, ...]
    rotaries: tuple[Rotary, ...]
    epsilon: float
    activation: Activation
    tied: bool
    biases: frozenset[str]
    attention_scale: float
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0
    parallel: bool = False

    def __post_init__(self) -> None:
        numbers = {
            name: getattr(self, name)
            for name in ("vocabulary", "hidden", "intermediate", "heads", "kv_heads", "head_size", "context")
        }
        bad = [f"{name} {value}" for name, value in numbers.items() if value < 1]
        if bad or not self.layers:
            raise ExportError(f"the base has {', '.join(bad) or 'no layer'}; its configuration is damaged")
        if self.heads % self.kv_heads:
            raise ExportError(f"{self.heads} query heads cannot share {self.kv_heads} key heads; expected a divisor")
        factors = ("epsilon", "attention_scale", "embedding_multiplier", "residual_multiplier", "logit_divisor")
        bad = [f"{name} {value!r:.40}" for name in factors if not _is_positive(value := getattr(self, name))]
        caps = ("attention_softcap", "logit_softcap")
        bad += [f"{name} {value!r:.40}" for name in caps if (value := getattr(self, name)) and not _is_positive(value)]
        if bad:
            raise ExportError(f"the base has {', '.join(bad)}, expected positive numbers; its configuration is damaged")
        turning = max(2 * rotary.pairs for rotary in self.rotaries)
        if turning > self.head_size:
            raise ExportError(f"{turning} of {self.head_size} values of a head turn; the configuration is damaged")
        windows = [layer.window for layer in self.layers if layer.window is not None and layer.window < 1]
        if windows:
            raise ExportError(
                f"a layer attends to {windows[0]} tokens, expected 1 or more; the configuration is damaged"
            )

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Linear module -> (n_out, n_in), packed ones too."""
        query, key, inner = self.heads * self.head_size, self.kv_heads * self.head_size, self.intermediate
        widths = {
            "q_proj": (query, self.hidden), "k_proj": (key, self.hidden), "v_proj": (key, self.hidden),
            "o_proj": (self.hidden, query), "gate_proj": (inner, self.hidden), "up_proj": (inner, self.hidden),
            "down_proj": (self.hidden, inner),
        }  # fmt: skip
        for packed, parts in PACKED.items():
            widths[packed] = (sum(widths[part][0] for part in parts), self.hidden)
        return widths

    @property
    def norms(self) -> tuple[str, ...]:
        """Norms of a block of hidden width: `attention_in`, `attention_out`, `mlp_in`, `mlp_out`, as it has them."""
        before, after = ("attention_in", "mlp_in"), ("attention_out", "mlp_out")
        if self.parallel:
            return ("attention_in",)
        return {"before": before, "after": after, "around": before + after}[self.architecture.norms]

    @property
    def long_from(self) -> int | None:
        """Number of tokens beyond which frequencies are others, None where length does not matter."""
        return next((r.long_from for r in self.rotaries if r.long_from is not None), None)


def config_from_json(config: Mapping[str, Any], name: str) -> DecoderConfig:
    """Read a Hugging Face configuration (config.json of transformers 4 or 5).

    Args:
        name: what the base is called in messages.

    Raises:
        ExportError: an architecture, or a part of one, that is not exported; it is named.
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
    if kind == "gemma3" or (str(kind) not in ARCHITECTURES and "Gemma3ForCausalLM" in classes):
        kind = "gemma3_text"
    row = ARCHITECTURES.get(str(kind))
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise ExportError(f"base '{name}' is of the architecture {kind!r:.40}; {known} can be exported")
    if classes and row.model_class not in classes:
        raise ExportError(
            f"base '{name}' is a {', '.join(map(str, classes))}, expected {row.model_class}: only models that continue "
            "a text can be exported"
        )
    return row


def _from_fields(row: Architecture, fields: Mapping[str, Any], explicit: Mapping[str, Any]) -> DecoderConfig:
    heads, hidden = _size(fields, "num_attention_heads"), _size(fields, "hidden_size")
    count = _size(fields, "num_hidden_layers", _MOST_LAYERS)
    head_size = _size(fields, "head_dim") if fields.get("head_dim") else hidden // heads
    activation = fields.get("hidden_activation") if "hidden_activation" in row.defaults else fields.get("hidden_act")
    context = _size(fields, "max_position_embeddings")
    layers, rotaries = _layers_and_rotaries(row, fields, count, head_size, context)
    granite = row.name.startswith("granite")
    if row.name == "stablelm" and fields.get("qk_layernorm"):
        raise ExportError("a StableLM with qk_layernorm (a LayerNorm of its own for each head) is not exported")
    inner = _size(fields, "shared_intermediate_size" if row.name == "granitemoehybrid" else "intermediate_size")
    kv_heads = _size(fields, "num_key_value_heads") if fields.get("num_key_value_heads") else heads
    epsilon = _number(fields, *(("layer_norm_eps", 1e-5) if row.norm == "layer" else ("rms_norm_eps", 1e-6)))
    if granite:
        scale = _number(fields, "attention_multiplier", 1.0)
    else:
        scale = 1 / math.sqrt(_number(fields, "query_pre_attn_scalar", head_size) or head_size)
    return DecoderConfig(
        architecture=row, vocabulary=_size(fields, "vocab_size"), hidden=hidden, intermediate=inner, heads=heads,
        kv_heads=kv_heads, head_size=head_size, context=context, layers=layers, rotaries=rotaries, epsilon=epsilon,
        activation=_activation(activation or "silu"), tied=bool(fields.get("tie_word_embeddings", False)),
        biases=_biases(row, fields),
        attention_scale=scale, attention_softcap=_number(explicit, "attn_logit_softcapping", 0.0),
        logit_softcap=_number(explicit, "final_logit_softcapping", 0.0),
        embedding_multiplier=math.sqrt(hidden) if row.name.startswith("gemma")
        else _number(fields, "embedding_multiplier", 1.0) if granite else 1.0,
        residual_multiplier=_number(fields, "residual_multiplier", 1.0) if granite else 1.0,
        logit_divisor=_number(fields, "logits_scaling", 1.0) if granite else 1.0,
        parallel=row.name == "stablelm" and bool(fields.get("use_parallel_residual")),
    )  # fmt: skip


def _is_positive(value: Any) -> bool:
    """Whether a number is one of float32 and more than 0."""
    return isinstance(value, int | float) and 0 < value < 1e38


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


def _activation(name: Any) -> Activation:
    if name not in _ACTIVATIONS:
        raise ExportError(f"the activation {name!r:.40} is not exported; {', '.join(_ACTIVATIONS)} are")
    return _ACTIVATIONS[name]


def _biases(row: Architecture, fields: Mapping[str, Any]) -> frozenset[str]:
    qkv = {"q_proj", "k_proj", "v_proj"}
    biases: set[str] = set()
    if row.name == "qwen2" or (row.name == "stablelm" and fields.get("use_qkv_bias")):
        biases |= qkv
    if fields.get("attention_bias") and row.name not in ("phi3", "mistral", "qwen2", "stablelm"):
        biases |= {*qkv, "o_proj"}
    if fields.get("mlp_bias") and row.name in ("llama", "granite", "smollm3"):
        biases |= {"gate_proj", "up_proj", "down_proj"}
    return frozenset(biases)


def _layers_and_rotaries(
    row: Architecture, fields: Mapping[str, Any], count: int, head_size: int, context: int
) -> tuple[tuple[Layer, ...], tuple[Rotary, ...]]:
    windows = _windows(row, fields, count)
    dimensions = int(head_size * _rotary_part(row, fields))
    original = fields.get("original_max_position_embeddings") if row.name == "phi3" else None
    parameters = fields.get("rope_parameters") or {}
    nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    scaling = fields.get("rope_scaling") or (None if nested else parameters) or None
    theta = float(fields.get("rope_theta") or (scaling or {}).get("rope_theta") or 10000.0)
    if row.name == "phi3" and scaling and scaling.get("type", scaling.get("rope_type")) == "yarn":
        scaling = {**scaling, "type": "longrope", "rope_type": "longrope"}
    if nested:
        scaling = nested.get("full_attention", {})
        theta = float(scaling.get("rope_theta") or theta)
    shared = rotary_from_config(theta, dimensions, scaling, context=context, original=original)
    if row.name == "gemma3_text":
        local = float(nested.get("sliding_attention", {}).get("rope_theta") or fields["rope_local_base_freq"])
        rotaries = (shared, rotary_from_config(local, dimensions, None, context=context))
        return tuple(Layer(w, 0 if w is None else 1) for w in windows), rotaries
    return tuple(Layer(w, r) for w, r in zip(windows, _turning(row, fields, count), strict=True)), (shared,)


def _rotary_part(row: Architecture, fields: Mapping[str, Any]) -> float:
    default = 0.25 if row.name == "stablelm" else 1.0
    nested = fields.get("rope_parameters") or {}
    return float(fields.get("partial_rotary_factor", nested.get("partial_rotary_factor", default)))


def _turning(row: Architecture, fields: Mapping[str, Any], count: int) -> list[int | None]:
    """For each layer which rotation it has, None for layers without positions."""
    if row.name == "granitemoehybrid":
        return [0 if fields.get("position_embedding_type") == "rope" else None] * count
    if row.name != "smollm3":
        return [0] * count
    every = int(fields["no_rope_layer_interval"])
    flags = fields.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(count)]
    if len(flags) != count:
        raise ExportError(f"no_rope_layers has {len(flags)} entries, expected {count}; copy config.json again")
    return [0 if flag else None for flag in flags]


def _windows(row: Architecture, fields: Mapping[str, Any], count: int) -> list[int | None]:
    """For each layer how many tokens it attends to, None for all."""
    kinds = fields.get("layer_types")
    if row.name == "granitemoehybrid":
        if not kinds or set(kinds) != {"attention"} or len(kinds) != count:
            raise ExportError("a hybrid with Mamba layers is not exported (layer_types); give a dense model")
        return [None] * count
    window = fields.get("sliding_window")
    if row.name in ("mistral", "phi3"):
        return [None if window is None else int(window)] * count
    if row.name in ("qwen2", "qwen3", "smollm3") and not fields.get("use_sliding_window"):
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
    if row.name == "gemma2":
        slides = [(i + 1) % 2 != 0 for i in range(count)]
    elif row.name == "gemma3_text":
        pattern = int(fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6)))
        slides = [(i + 1) % pattern != 0 for i in range(count)]
    elif row.name in ("qwen2", "qwen3"):
        slides = [i >= int(fields.get("max_window_layers", 28)) for i in range(count)]
    elif row.name == "smollm3":
        slides = [rotary is None for rotary in _turning(row, fields, count)]
    else:
        slides = [False] * count
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], factors: Mapping[str, Float], name: str
) -> DecoderConfig:
    """Read the metadata of a GGUF model.

    Args:
        shapes: of all tensors, by name.
        factors: values of the tensors `rope_freqs`, `rope_factors_long`, `rope_factors_short` that it has.

    Raises:
        ExportError: an architecture, or a part of one, that is not exported; it is named.
    """
    kind = metadata.get("general.architecture")
    if metadata.get("general.type", "model") != "model":
        raise ExportError(f"'{name}' is a GGUF {metadata['general.type']!r:.40}, expected a model; give a base")
    rows = gguf_architectures()
    if not isinstance(kind, str) or kind not in rows:
        raise ExportError(f"base '{name}' is of the GGUF architecture {kind!r:.40}; {', '.join(rows)} can be exported")
    fields = {k.removeprefix(f"{kind}."): v for k, v in metadata.items() if k.startswith(f"{kind}.")}
    if fields.get("expert_count"):
        raise ExportError(f"base '{name}' ({kind}) is a mixture of experts, which is not exported; give a dense model")
    try:
        return _from_metadata(rows[kind], fields, metadata, shapes, factors)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ExportError(f"base '{name}': its metadata cannot be read: {reason}; convert it again") from error


def _from_metadata(
    row: Architecture, fields: Mapping[str, Any], metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]],
    factors: Mapping[str, Float],
) -> DecoderConfig:  # fmt: skip
    heads, hidden = _one(fields["attention.head_count"]), int(fields["embedding_length"])
    head_size = int(fields.get("attention.key_length") or hidden // heads)
    if int(fields.get("attention.value_length") or head_size) != head_size:
        raise ExportError("keys and values of different length are not exported")
    count, context = int(fields["block_count"]), int(fields["context_length"])
    if not 1 <= count <= _MOST_LAYERS:
        raise ExportError(f"block_count is {count}, expected 1 to {_MOST_LAYERS}; convert it again")
    gemma, granite = row.name.startswith("gemma"), row.name == "granite"
    if "blk.0.attn_q_norm.weight" in shapes and row.query_key_norm == "none":
        raise ExportError(f"a {row.name} with norms of queries and keys is not exported")
    if row.name == "olmo2" and fields.get("attention.sliding_window"):
        raise ExportError("an OLMo 2 with sliding windows (OLMo 3) is not exported; give an OLMo 2")
    embedding = shapes["token_embd.weight"]
    epsilon = "attention.layer_norm_epsilon" if row.norm == "layer" else "attention.layer_norm_rms_epsilon"
    capped = row.name in ("gemma2", "gemma3_text")
    attention_softcap, logit_softcap = (50.0, 30.0) if row.name == "gemma2" else (0.0, 0.0)
    if row.name == "gemma2":
        attention_softcap = float(fields.get("attn_logit_softcapping", attention_softcap))
    if capped:
        logit_softcap = float(fields.get("final_logit_softcapping", logit_softcap))
    scale = float(fields.get("attention.scale") or 0) if granite else 0.0
    layers, rotaries = _gguf_layers(row, fields, factors, count, head_size, context)
    return DecoderConfig(
        architecture=row, vocabulary=int(embedding[0]), hidden=hidden, intermediate=_one(fields["feed_forward_length"]),
        heads=heads, kv_heads=_one(fields.get("attention.head_count_kv", heads)), head_size=head_size, context=context,
        layers=layers, rotaries=rotaries, epsilon=float(fields[epsilon]),
        activation="gelu_tanh" if gemma else "silu", tied="output.weight" not in shapes,
        biases=_gguf_biases(row, shapes),
        attention_scale=scale or _gguf_scale(row, hidden, heads, head_size, count),
        attention_softcap=attention_softcap, logit_softcap=logit_softcap,
        embedding_multiplier=math.sqrt(hidden) if gemma
        else float(fields.get("embedding_scale") or 1) if granite else 1.0,
        residual_multiplier=float(fields.get("residual_scale") or 1) if granite else 1.0,
        logit_divisor=float(fields.get("logit_scale") or 1) if granite else 1.0,
        parallel=row.name == "stablelm" and "blk.0.ffn_norm.weight" not in shapes,
    )  # fmt: skip


def _one(value: Any) -> int:
    """A number that a file may give for each layer, when it is the same in all."""
    numbers = set(value) if isinstance(value, list) else {value}
    if len(numbers) != 1:
        raise ExportError(f"layers of different widths ({sorted(numbers)}) are not exported")
    return int(numbers.pop())


def _gguf_scale(row: Architecture, hidden: int, heads: int, head_size: int, count: int) -> float:
    """As llama.cpp has it: the largest Gemma 2 and 3 divide by the width of a head that they do not have."""
    largest = {"gemma2": 46, "gemma3_text": 62}.get(row.name)
    return 1 / math.sqrt(hidden // heads if count == largest else head_size)


def _gguf_biases(row: Architecture, shapes: Mapping[str, Sequence[int]]) -> frozenset[str]:
    return frozenset(m for m, name in row.gguf_paths.items() if f"blk.0.{name}.bias" in shapes)


def _gguf_layers(
    row: Architecture, fields: Mapping[str, Any], factors: Mapping[str, Float], count: int, head_size: int, context: int
) -> tuple[tuple[Layer, ...], tuple[Rotary, ...]]:
    dimensions = int(fields.get("rope.dimension_count") or head_size)
    rotary = _gguf_rotary(fields, factors, dimensions, context)
    window = fields.get("attention.sliding_window")
    windows: list[int | None] = [None] * count
    if window and row.name in ("gemma2", "gemma3_text"):
        pattern = fields.get("attention.sliding_window_pattern", 2 if row.name == "gemma2" else 6)
        slides = pattern if isinstance(pattern, list) else [(i + 1) % int(pattern) != 0 for i in range(count)]
        windows = [int(window) if slide else None for slide in slides[:count]]
    elif window and row.name in ("phi3", "llama"):
        windows = [int(window)] * count
    if row.name == "gemma3_text":
        local = rotary_from_config(float(fields.get("rope.freq_base_swa", 10000.0)), dimensions, None, context=context)
        return tuple(Layer(w, 0 if w is None else 1) for w in windows), (rotary, local)
    turning = [None if row.name == "smollm3" and (i + 1) % 4 == 0 else 0 for i in range(count)]
    return tuple(Layer(w, r) for w, r in zip(windows, turning, strict=True)), (rotary,)


def _gguf_rotary(fields: Mapping[str, Any], factors: Mapping[str, Float], dimensions: int, context: int) -> Rotary:
    theta = float(fields.get("rope.freq_base", 10000.0))
    original = fields.get("rope.scaling.original_context_length")
    if "rope_factors_long" in factors:
        start = int(original or context)
        scaling = {
            "rope_type": "longrope", "short_factor": factors["rope_factors_short"].tolist(),
            "long_factor": factors["rope_factors_long"].tolist(),
            "attention_factor": fields.get("rope.scaling.attn_factor") or longrope_scale(context, start),
        }  # fmt: skip
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
        }  # fmt: skip
    unscaled = kind == "none" or linear in (None, 0, 1)
    rotary = rotary_from_config(theta, dimensions, None if unscaled else scaling, context=context)
    rotary = dataclasses.replace(rotary, scale=rotary.scale * float(fields.get("rope.scaling.attn_factor") or 1))
    if not _is_positive(rotary.scale):
        raise ExportError(f"rope.scaling.attn_factor makes {rotary.scale} of the rotation; convert it again")
    if "rope_freqs" not in factors:
        return rotary
    divisors = np.asarray(factors["rope_freqs"], np.float32)  # Llama 3
    if len(divisors) != rotary.pairs:
        raise ExportError(f"rope_freqs has {len(divisors)} entries, expected {rotary.pairs}; convert it again")
    if not (np.isfinite(divisors).all() and divisors.min() > 0):
        raise ExportError("rope_freqs holds numbers that are not positive; convert it again")
    llama3 = llama3_scaling(rotary.frequencies, divisors) or rotary.scaling
    return dataclasses.replace(rotary, frequencies=rotary.frequencies / divisors, scaling=llama3)
