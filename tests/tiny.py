"""Tiny models with random weights, saved as the folders that people really have: Hugging Face, PEFT, encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")

import peft
import torch
import transformers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = SPECIAL[2]
_PAIRS = [
    "th",
    "he",
    "in",
    "er",
    "an",
    "re",
    "on",
    "at",
    "en",
    "nd",
    "ti",
    "es",
    "or",
    "te",
    "of",
    "ed",
    "is",
    "it",
    "al",
    "ar",
    "st",
    "to",
    "nt",
    "ng",
    "se",
    "ha",
    "as",
    "ou",
    "io",
    "le",
    "ve",
    "co",
    "me",
    "de",
    "hi",
    "ri",
    "ro",
    "ic",
    "ne",
    "ea",
    "ra",
]
#: 256 bytes, 41 pairs of letters, 3 special tokens.
VOCABULARY = 300
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 3,
    "tie_word_embeddings": False,
}
_GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
_GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "tie_word_embeddings": True,
}
#: One for each row of `edgecompose.architectures`: class of the configuration, class of the model, and what differs
#: from `_SHAPE`. Windows are of 16 tokens.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"original_max_position_embeddings": 512}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 32, "sliding_window": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _GEMMA),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 24}),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GEMMA, "num_hidden_layers": 6, "sliding_window": 16, "query_pre_attn_scalar": 24},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", _GRANITE),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **_GRANITE,
            "shared_intermediate_size": 96,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": ["attention"] * 2,
            "position_embedding_type": "rope",
        },
    ),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {"use_qkv_bias": True}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
}


def write_tokenizer(folder: Path) -> None:
    """A small byte-level BPE with a ChatML template, as transformers saves it."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_PAIRS]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [(p[0], p[1]) for p in _PAIRS]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_model(folder: Path, architecture: str, *, seed: int = 0, **settings: Any) -> Path:
    """A causal model of one of ARCHITECTURES in float32, with its tokenizer.

    Args:
        settings: of the configuration, more or others.
    """
    config_class, model_class, changes = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**(_SHAPE | changes | settings))
    model = getattr(transformers, model_class)(config)
    randomize(model, seed=seed)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def randomize(model: Any, *, seed: int, spread: float = 0.12) -> None:
    """Give every parameter random values, biases and norms too, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(values + 1 if "norm" in name.lower() and name.endswith("weight") else values)


def write_gpt2(folder: Path) -> Path:
    """A model that transformers knows and the builder does not."""
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_gguf(path: Path, source: Path) -> Path:
    """The tiny Llama in `source` as a GGUF file in float32, as llama.cpp's converter would write it."""
    import gguf

    model = transformers.LlamaForCausalLM.from_pretrained(source, local_files_only=True)
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*words, *SPECIAL])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words) + [gguf.TokenType.CONTROL] * len(SPECIAL))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.eos_token_id - 1)  # <|im_start|>, as SmolLM2 has it
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values, module = tensor.numpy(), name.split(".")[-2]
        if module in heads:  # GGUF keeps the two halves of a rotary pair side by side
            values = values.reshape(heads[module], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_lora(folder: Path, base: Path, *, seed: int = 0, spread: float = 0.1, **settings: Any) -> Path:
    """A PEFT LoRA folder for a model folder, both factors random.

    Args:
        settings: of `peft.LoraConfig`; rank 4, alpha 8 and all linear modules unless told otherwise.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(**chosen))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def write_encoder(folder: Path, *, pooling: str = "mean", max_length: int = 32, seed: int = 0) -> Path:
    """A sentence-transformers folder around a tiny BERT.

    Args:
        pooling: 'mean', 'cls', 'max', or another of sentence-transformers' modes.
        max_length: window in tokens.
    """
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    randomize(model, seed=seed, spread=0.2)
    model.save_pretrained(folder)
    _encoder_tokenizer().save(str(folder / "tokenizer.json"))
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    mode = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}.get(pooling, pooling)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    flags = {f"pooling_mode_{name}": name == mode for name in modes}
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **flags})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    return folder


def write_json(path: Path, value: Any) -> Path:
    """Write a value as JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_task(path: Path, prompts: Sequence[str], answer: str = "yes") -> Path:
    """A JSONL file of examples."""
    lines = (json.dumps({"prompt": prompt, "answer": answer}) for prompt in prompts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _encoder_tokenizer() -> Tokenizer:
    special = ("[PAD]", "[CLS]", "[SEP]")
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *_PAIRS]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [(p[0], p[1]) for p in _PAIRS]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer
