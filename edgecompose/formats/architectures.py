"""The table of decoder architectures: how each differs from Llama, and what files call its tensors.

A row is all that an architecture needs, in reading bases (Hugging Face and GGUF), in the decoder graph, and in reading
and writing adapters. Sources: the modeling files of transformers 4.57 and llama.cpp's tensor names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from edgecompose.errors import BundleError

NormKind = Literal["rms", "layer"]
#: Where the norms of a block stand: before attention and MLP, behind both (before each is added), or before and behind.
NormPlacement = Literal["before", "after", "around"]
#: Norm of queries and keys: none, over each head, or over all heads together.
QueryKeyNorm = Literal["none", "head", "width"]

#: The linear modules of a block that may have adapters, in the order of computation.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Projections that hold the rows of several modules, and those modules in order.
PACKED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
)
_PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_PACKED_PATHS = {
    "qkv_proj": "self_attn.qkv_proj",
    "o_proj": "self_attn.o_proj",
    "gate_up_proj": "mlp.gate_up_proj",
    "down_proj": "mlp.down_proj",
}
_SHARED_PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_up_proj": "shared_mlp.input_linear",
    "down_proj": "shared_mlp.output_linear",
}
_GGUF = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_PACKED_GGUF = {"qkv_proj": "attn_qkv", "o_proj": "attn_output", "gate_up_proj": "ffn_up", "down_proj": "ffn_down"}


#: A field of `biases` that stands for no field: these modules always have biases.
ALWAYS = ""
_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION_BIAS = {"attention_bias": (*_QKV, "o_proj")}
_LLAMA_BIASES = {**_ATTENTION_BIAS, "mlp_bias": ("gate_proj", "up_proj", "down_proj")}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row. The defaults are Llama's.

    Attributes:
        name: `model_type` of transformers' configuration.
        model_class: the causal model in `architectures` of config.json.
        aliases: other values of `model_type` for this model class.
        gguf: `general.architecture` of its GGUF files, None where it has none.
        interleaved: GGUF files hold rotary pairs of q and k side by side, not in two halves.
        norm, norms, query_key_norm: see `NormKind`, `NormPlacement` and `QueryKeyNorm`.
        unit_offset: Hugging Face weights w of RMS norms mean 1 + w (GGUF files hold 1 + w).
        defaults: fields that config.json may leave out, with transformers' values.
        biases: field of config.json (or `ALWAYS`) -> linear modules that have a bias where the field is true.
        windows: layers with a sliding window: those of `layer_types`, or all, or those of `layer_types` where
            `use_sliding_window` is true.
        full_every: without `layer_types`, every n-th layer attends to all tokens and the others to a window.
        unrotated_every: without `no_rope_layers`, every n-th layer has no positions.
        rotary_part: share of a head's values that rotate, where config.json does not say.
        local_rotary: layers with a window rotate with a base of their own.
        longrope: a scaled rotation is LongRoPE, from `original_max_position_embeddings` of config.json itself.
        scaled_embedding: embeddings are multiplied by the square root of the hidden size.
        multipliers: the configuration names factors of attention, embeddings, residuals and logits.
        softcaps: fields of GGUF files for soft caps of attention and logits, with their defaults.
        wide_scale_layers: number of layers of the model whose attention scale is 1 / sqrt(hidden / heads); GGUF files
            have no field for it.
        may_be_parallel: `use_parallel_residual` may let attention and MLP read the same norm.
        hybrid: a dense member of a family with Mamba layers: `layer_types` and `position_embedding_type` say so, and
            the MLP's width is `shared_intermediate_size`.
        refused: field of config.json or of GGUF files -> the part that it stands for, which is not exported.
        space_prefix: SentencePiece puts a space before a text, where a GGUF file does not say.
        tab_is_byte: the token of a tab is that of its byte.
        strips_right: special tokens strip the white space after them; GGUF files have no field for it.
        paths: linear module, or what packs several, -> its path in a block of the transformers model.
        gguf_paths: the same in a block of a GGUF file.
    """

    name: str
    model_class: str
    aliases: tuple[str, ...] = ()
    gguf: str | None = None
    interleaved: bool = False
    norm: NormKind = "rms"
    norms: NormPlacement = "before"
    query_key_norm: QueryKeyNorm = "none"
    unit_offset: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _ATTENTION_BIAS)
    windows: Literal["layer_types", "all", "optional"] = "layer_types"
    full_every: int | None = None
    unrotated_every: int | None = None
    rotary_part: float = 1.0
    local_rotary: bool = False
    longrope: bool = False
    scaled_embedding: bool = False
    multipliers: bool = False
    softcaps: Mapping[str, float] = field(default_factory=dict)
    wide_scale_layers: int | None = None
    may_be_parallel: bool = False
    hybrid: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    space_prefix: bool = True
    tab_is_byte: bool = False
    strips_right: bool = False
    paths: Mapping[str, str] = field(default_factory=lambda: _PATHS)
    gguf_paths: Mapping[str, str] = field(default_factory=lambda: _GGUF)

    def path(self, layer: int, module: str) -> str:
        """Path of a linear module in the transformers model, such as `model.layers.0.self_attn.q_proj`."""
        return f"model.layers.{layer}.{self.paths[module]}"


_TIED = {"tie_word_embeddings": True}
_ROWS = (
    Architecture(
        name="llama",
        model_class="LlamaForCausalLM",
        gguf="llama",
        interleaved=True,
        biases=_LLAMA_BIASES,
    ),
    Architecture(
        name="mistral",
        model_class="MistralForCausalLM",
        gguf="llama",
        interleaved=True,
        defaults={"sliding_window": 4096},
        biases={},
        windows="all",
    ),
    Architecture(
        name="qwen2",
        model_class="Qwen2ForCausalLM",
        gguf="qwen2",
        biases={ALWAYS: _QKV},
        windows="optional",
    ),
    Architecture(
        name="qwen3",
        model_class="Qwen3ForCausalLM",
        gguf="qwen3",
        query_key_norm="head",
        defaults={"head_dim": 128},
        windows="optional",
    ),
    Architecture(
        name="gemma",
        model_class="GemmaForCausalLM",
        gguf="gemma",
        unit_offset=True,
        defaults={**_TIED, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256},
        scaled_embedding=True,
        space_prefix=False,
        tab_is_byte=True,
    ),
    Architecture(
        name="gemma2",
        model_class="Gemma2ForCausalLM",
        gguf="gemma2",
        norms="around",
        unit_offset=True,
        defaults={
            **_TIED,
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        full_every=2,
        scaled_embedding=True,
        softcaps={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        wide_scale_layers=46,
        space_prefix=False,
        tab_is_byte=True,
    ),
    Architecture(
        name="gemma3_text",
        model_class="Gemma3ForCausalLM",
        aliases=("gemma3",),
        gguf="gemma3",
        norms="around",
        unit_offset=True,
        query_key_norm="head",
        defaults={
            **_TIED,
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        full_every=6,
        local_rotary=True,
        scaled_embedding=True,
        softcaps={"final_logit_softcapping": 0.0},
        wide_scale_layers=62,
        space_prefix=False,
        tab_is_byte=True,
    ),
    Architecture(
        name="phi3",
        model_class="Phi3ForCausalLM",
        gguf="phi3",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        biases={},
        windows="all",
        longrope=True,
        strips_right=True,
        paths=_PACKED_PATHS,
        gguf_paths=_PACKED_GGUF,
    ),
    Architecture(
        name="olmo2",
        model_class="Olmo2ForCausalLM",
        gguf="olmo2",
        norms="after",
        query_key_norm="width",
        defaults={"rms_norm_eps": 1e-5},
        refused={"attention.sliding_window": "sliding windows (OLMo 3)"},
    ),
    Architecture(
        name="granite",
        model_class="GraniteForCausalLM",
        gguf="granite",
        interleaved=True,
        biases=_LLAMA_BIASES,
        multipliers=True,
    ),
    Architecture(
        name="granitemoehybrid",
        model_class="GraniteMoeHybridForCausalLM",
        multipliers=True,
        hybrid=True,
        paths=_SHARED_PATHS,
    ),
    Architecture(
        name="stablelm",
        model_class="StableLmForCausalLM",
        gguf="stablelm",
        norm="layer",
        biases={"use_qkv_bias": _QKV},
        rotary_part=0.25,
        may_be_parallel=True,
        refused={"qk_layernorm": "a LayerNorm for each head of queries and keys"},
    ),
    Architecture(
        name="smollm3",
        model_class="SmolLM3ForCausalLM",
        gguf="smollm3",
        interleaved=True,
        defaults={**_TIED, "rope_theta": 2e6, "no_rope_layer_interval": 4},
        biases=_LLAMA_BIASES,
        windows="optional",
        unrotated_every=4,
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.name: row for row in _ROWS})
#: Path in a block of any transformers model -> the linear module, or what packs several.
MODULE_AT: Mapping[str, str] = MappingProxyType(
    {path: module for row in ARCHITECTURES.values() for module, path in row.paths.items()}
)


def architecture_of(name: str | None) -> Architecture:
    """The row of a base's architecture; Llama's where an older bundle names none.

    Raises:
        BundleError: no row has that name.
    """
    if name is None:
        return ARCHITECTURES["llama"]
    if name not in ARCHITECTURES:
        raise BundleError(
            f"the base is of the architecture {name!r:.40}, expected one of {', '.join(ARCHITECTURES)}; "
            "update edgecompose, or export the base again"
        )
    return ARCHITECTURES[name]


def gguf_architectures() -> dict[str, Architecture]:
    """The row that reads the GGUF files of each `general.architecture`; where several share one, the first."""
    rows: dict[str, Architecture] = {}
    for row in ARCHITECTURES.values():
        if row.gguf is not None:
            rows.setdefault(row.gguf, row)
    return rows


def with_windows(row: Architecture) -> Architecture | None:
    """The row of GGUF files of the same name whose layers all have windows, None where there is none."""
    return next((other for other in _ROWS if other.gguf == row.gguf and other.windows == "all"), None)
