"""Tiny Hugging Face models of every architecture as GGUF files, as llama.cpp's converter writes them.

The converter (convert_hf_to_gguf.py) decides names, order of rows, what is added to norms, and the metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tests import tiny

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

import torch
import transformers

Array = npt.NDArray[Any]
_SHAPE = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 298,
    "eos_token_id": 299,
    "pad_token_id": 297,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + i * 0.1 for i in range(12)],
    "long_factor": [2.0 + i for i in range(12)],
}
_GEMMA = {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}


@dataclass(frozen=True, slots=True)
class Model:
    """Classes of a model in transformers, what differs from `_SHAPE`, and the name of the architecture in GGUF."""

    name: str
    gguf: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, **changes: Any) -> Path:
        """A Hugging Face folder with random weights and a tokenizer."""
        kind = {"gemma3": "Gemma3Text"}.get(self.gguf, self.name)
        config = getattr(transformers, f"{kind}Config")(**(_SHAPE | dict(self.changes) | changes))
        model = getattr(transformers, f"{self.name}ForCausalLM")(config)
        tiny.randomize(model, seed=1)
        model.save_pretrained(folder)
        tiny.write_tokenizer(folder)
        return folder


#: Every architecture that GGUF knows, in the variants that its metadata can tell apart.
MODELS: Mapping[str, Model] = {
    "llama": Model("Llama", "llama"),
    "llama-3.2": Model("Llama", "llama", {"rope_theta": 5e5, "rope_scaling": _LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": Model("Llama", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": Model("Llama", "llama", {"rope_scaling": {**_YARN, "beta_fast": 16.0}}),
    "llama-yarn-factor": Model("Llama", "llama", {"rope_scaling": {**_YARN, "attention_factor": 1.3}}),
    "llama-wide-heads": Model("Llama", "llama", {"head_dim": 32}),
    "llama-bias": Model("Llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Model("Mistral", "llama", {"rope_theta": 1e6, "sliding_window": None}),
    "qwen2": Model("Qwen2", "qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True, "vocab_size": 304}),
    "qwen2-yarn": Model("Qwen2", "qwen2", {"rope_theta": 1e6, "rope_scaling": _YARN}),
    "qwen3": Model("Qwen3", "qwen3", {"rope_theta": 1e6, "head_dim": 32}),
    "gemma": Model("Gemma", "gemma", {**_GEMMA, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": Model("Gemma2", "gemma2", {**_GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gemma3": Model(
        "Gemma3",
        "gemma3",
        {**_GEMMA, "hidden_size": 96, "num_hidden_layers": 7, "sliding_window": 16, "query_pre_attn_scalar": 32},
    ),
    "gemma3-linear": Model(
        "Gemma3",
        "gemma3",
        {
            **_GEMMA,
            "num_hidden_layers": 7,
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": Model("Phi3", "phi3", {"original_max_position_embeddings": 512, "sliding_window": 17}),
    "phi3-long": Model(
        "Phi3",
        "phi3",
        {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "rope_scaling": _LONGROPE,
            "sliding_window": 1024,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": Model("Olmo2", "olmo2", {"rope_theta": 5e5, "num_key_value_heads": 4}),
    "granite": Model(
        "Granite",
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0625,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "stablelm": Model("StableLm", "stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": Model("StableLm", "stablelm", {"use_parallel_residual": True}),
    "smollm3": Model("SmolLM3", "smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
}


def write_gguf(
    path: Path,
    source: Path,
    kind: str = "F32",
    *,
    shard_tensors: int = 0,
    omit: Sequence[str] = (),
    extra: Mapping[str, Array] | None = None,
    extra_type: GGMLQuantizationType | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A Hugging Face folder as GGUF.

    Args:
        kind: type of all matrices; those that the package gguf cannot quantise get random blocks.
        shard_tensors: how many tensors a shard has at most, 0 for one file.
        omit: tensors that are left out, by their names in the file.
        extra: more tensors, or others in their place, all of `extra_type` where they are bytes.
        metadata: more keys, or others in their place; text and numbers.

    Returns:
        The file, or its first shard.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(source, local_files_only=True, dtype=torch.float32)
    config = model.config
    arch = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=shard_tensors)
    _add_parameters(writer, arch, config)
    _add_tokenizer(writer, source, config)
    for key, value in (metadata or {}).items():
        kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kinds[type(value)])
    tensors = _tensors(arch, model) | _rotary_tensors(config) | dict(extra or {})
    for i, (name, values) in enumerate(tensors.items()):
        if name in omit:
            continue
        if values.dtype == np.uint8:
            writer.add_tensor(name, values, raw_dtype=extra_type)
        elif values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(name, quantized(values, kind, seed=i), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0] if shard_tensors else path


def _add_parameters(writer: gguf.GGUFWriter, arch: str, config: Any) -> None:
    writer.add_name("tiny")
    writer.add_file_type(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_theta)
    if arch == "stablelm":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if arch not in ("phi3", "stablelm", "olmo2", "granite"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if arch not in ("gemma", "gemma2", "gemma3", "qwen2", "qwen3", "olmo2"):
        writer.add_rope_dimension_count(int(head * (getattr(config, "partial_rotary_factor", None) or 1.0)))
    if arch in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    _add_scaling(writer, config)


def _add_scaling(writer: gguf.GGUFWriter, config: Any) -> None:
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        if scaling.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(scaling["attention_factor"])
        if scaling.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
    elif kind == "longrope":
        extension = config.max_position_embeddings / config.original_max_position_embeddings
        factor = math.sqrt(1 + math.log(extension) / math.log(config.original_max_position_embeddings))
        writer.add_rope_scaling_attn_factors(factor)


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, config: Any) -> None:
    state = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    words = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    padding = config.vocab_size - len(words) - len(tiny.SPECIAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*words, *tiny.SPECIAL, *(f"[PAD{i}]" for i in range(padding))])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.NORMAL] * len(words) + [kinds.CONTROL] * len(tiny.SPECIAL) + [kinds.UNUSED] * padding)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(298)
    writer.add_eos_token_id(299)
    writer.add_pad_token_id(297)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)


def _tensors(arch: str, model: Any) -> dict[str, Array]:
    config = model.config
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors: dict[str, Array] = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values, module = parameter.numpy().copy(), name.split(".")[-2]
        if module in heads and arch in ("llama", "granite", "smollm3"):  # rotary pairs side by side
            values = values.reshape(heads[module], 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values += 1
        tensors[str(names.get_name(name, try_suffixes=(".weight", ".bias")))] = values
    return tensors


def _rotary_tensors(config: Any) -> dict[str, Array]:
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(scaling[f"{name}_factor"], np.float32) for name in ("long", "short")
        }
    if kind != "llama3":
        return {}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / (config.rope_theta ** (np.arange(0, size, 2, dtype=np.float32) / size))
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    divisors = []
    for wavelength in 2 * math.pi / frequencies:
        smooth = (original / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < original / high else factor if wavelength > original / low else between)
    return {"rope_freqs.weight": np.array(divisors, np.float32)}


#: Where float16 scales stand in a block of those types that the package gguf cannot quantise, and the second's sign.
_SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def quantized(values: Array, kind: str, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Rows of a matrix as blocks of a type, (rows, bytes of a row); random ones where gguf cannot quantise."""
    known = GGMLQuantizationType[kind]
    if kind not in _SCALES:
        return np.ascontiguousarray(gguf.quants.quantize(values, known)).view(np.uint8)
    block, size = GGML_QUANT_SIZES[known]
    rows, width = values.shape
    raw = np.random.default_rng(seed).integers(0, 256, (rows * width // block, size), np.uint8)
    middle = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}.get(kind, 0.0)
    for scale in (1.0, None):
        if scale is None:
            scale = 0.12 / float(gguf.quants.dequantize(raw, known).std())
        for offset, factor in zip(_SCALES[kind], (1.0, middle), strict=False):
            raw[:, offset : offset + 2] = np.array([scale * factor], "<f2").view(np.uint8)
    return raw.reshape(rows, -1)
