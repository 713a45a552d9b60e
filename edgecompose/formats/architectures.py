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


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row.

    Attributes:
        name: `model_type` of transformers' configuration.
        model_class: the causal model in `architectures` of config.json.
        gguf: `general.architecture` of its GGUF files, None where it has none.
        interleaved: GGUF files hold rotary pairs of q and k side by side, not in two halves.
        unit_offset: Hugging Face weights w of RMS norms mean 1 + w (GGUF files hold 1 + w).
        defaults: fields that config.json may leave out, with transformers' values.
        paths: linear module, or what packs several, -> its path in a block of the transformers model.
        gguf_paths: the same in a block of a GGUF file.
    """

    name: str
    model_class: str
    gguf: str | None = None
    interleaved: bool = False
    norm: NormKind = "rms"
    norms: NormPlacement = "before"
    query_key_norm: QueryKeyNorm = "none"
    unit_offset: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=lambda: _PATHS)
    gguf_paths: Mapping[str, str] = field(default_factory=lambda: _GGUF)

    def path(self, layer: int, module: str) -> str:
        """Path of a linear module in the transformers model, such as `model.layers.0.self_attn.q_proj`."""
        return f"model.layers.{layer}.{self.paths[module]}"


_TIED = {"tie_word_embeddings": True}
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        row.name: row
        for row in (
            Architecture("llama", "LlamaForCausalLM", "llama", interleaved=True),
            Architecture("mistral", "MistralForCausalLM", "llama", interleaved=True, defaults={"sliding_window": 4096}),
            Architecture("qwen2", "Qwen2ForCausalLM", "qwen2"),
            Architecture("qwen3", "Qwen3ForCausalLM", "qwen3", query_key_norm="head", defaults={"head_dim": 128}),
            Architecture(
                "gemma",
                "GemmaForCausalLM",
                "gemma",
                unit_offset=True,
                defaults={**_TIED, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256},
            ),
            Architecture(
                "gemma2",
                "Gemma2ForCausalLM",
                "gemma2",
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
            ),
            Architecture(
                "gemma3_text",
                "Gemma3ForCausalLM",
                "gemma3",
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
            ),
            Architecture(
                "phi3",
                "Phi3ForCausalLM",
                "phi3",
                paths=_PACKED_PATHS,
                gguf_paths=_PACKED_GGUF,
                defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
            ),
            Architecture(
                "olmo2",
                "Olmo2ForCausalLM",
                "olmo2",
                norms="after",
                query_key_norm="width",
                defaults={"rms_norm_eps": 1e-5},
            ),
            Architecture("granite", "GraniteForCausalLM", "granite", interleaved=True),
            Architecture("granitemoehybrid", "GraniteMoeHybridForCausalLM", paths=_SHARED_PATHS),
            Architecture("stablelm", "StableLmForCausalLM", "stablelm", norm="layer"),
            Architecture(
                "smollm3",
                "SmolLM3ForCausalLM",
                "smollm3",
                interleaved=True,
                defaults={**_TIED, "rope_theta": 2e6, "no_rope_layer_interval": 4},
            ),
        )
    }
)


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
