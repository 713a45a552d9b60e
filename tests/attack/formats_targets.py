"""Targets of what other programs write: adapters, GGUF bases, folders of bases and encoders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from edgecompose.adapters import convert_adapter
from edgecompose.bundle.adapter import load_adapter
from edgecompose.bundle.quantization import dequantize
from edgecompose.bundle.specs import BaseSpec, SlotGroup
from edgecompose_export.base.source import open_base
from edgecompose_export.embedder import describe_encoder
from tests.attack.mutations import mutate_bytes, mutate_json_text, write_text
from tests.attack.target import Target
from tests.attack.texts_targets import TEMPLATE, byte_level, tokenizer_texts

Float = npt.NDArray[np.float32]
_LAYERS, _HIDDEN, _KEYS, _INNER, _RANK = 2, 32, 16, 48, 4
_WIDTHS = {
    "q_proj": (_HIDDEN, _HIDDEN),
    "k_proj": (_HIDDEN, _KEYS),
    "v_proj": (_HIDDEN, _KEYS),
    "o_proj": (_HIDDEN, _HIDDEN),
    "gate_proj": (_HIDDEN, _INNER),
    "up_proj": (_HIDDEN, _INNER),
    "down_proj": (_INNER, _HIDDEN),
}
BASE = BaseSpec(
    graph="decoder.onnx",
    tokenizer="tokenizer.json",
    identity="a" * 64,
    precision="fp32",
    context=512,
    kv_heads=2,
    head_size=8,
    vocabulary=300,
    end_tokens=(299,),
    slots=tuple(SlotGroup(name, _LAYERS, *sizes) for name, sizes in _WIDTHS.items()),
    architecture="llama",
)


def _factors() -> dict[tuple[int, str, str], Float]:
    rng = np.random.default_rng(0)
    return {
        (layer, module, side): rng.standard_normal(shape).astype(np.float32)
        for layer in range(_LAYERS)
        for module, (n_in, n_out) in _WIDTHS.items()
        for side, shape in (("A", (_RANK, n_in)), ("B", (n_out, _RANK)))
        if module in ("q_proj", "v_proj", "down_proj")
    }


def _path(layer: int, module: str) -> str:
    return f"model.layers.{layer}.{'mlp' if module in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{module}"


def _prepare_peft(folder: Path) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": 8,
        "rank_pattern": {r".*layers\.[0-9]+\.self_attn\.(q|v)_proj": _RANK},
        "alpha_pattern": {"q_proj": 4, r"^model\.layers\.1\..*": 6},
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "modules_to_save": None,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
    }
    tensors = {f"base_model.model.{_path(n, m)}.lora_{s}.weight": values for (n, m, s), values in _factors().items()}
    write_text(folder / "adapter_config.json", json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def _prepare_mlx(folder: Path) -> None:
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": _RANK, "scale": 2.0, "dropout": 0.0},
    }
    tensors = {
        f"{_path(n, m)}.lora_{s.lower()}": np.ascontiguousarray(values.T) for (n, m, s), values in _factors().items()
    }
    write_text(folder / "adapter_config.json", json.dumps(config))
    (folder / "adapters.safetensors").write_bytes(save(tensors))


_PATTERNS = (
    "(.*.*.*)*Z",
    "((a+)+)+$",
    "[",
    "a{99999}",
    "(?<=x)y",
    "q_proj",
    ".*",
    "(" * 300,
    "a?" * 50 + "a" * 50,
    "\ud800",
)


def _mutate_adapter(rng: random.Random, folder: Path) -> None:
    """Damage to the config, to the weights, or to both."""
    config = folder / "adapter_config.json"
    (weights,) = folder.glob("*.safetensors")
    kind = rng.randrange(8)
    if kind <= 2:
        write_text(config, mutate_json_text(rng, config.read_text(encoding="utf-8")))
    if kind == 3:
        fields = json.loads(config.read_text(encoding="utf-8"))
        name = rng.choice(("rank_pattern", "alpha_pattern"))
        fields[name] = {
            rng.choice(_PATTERNS) * rng.choice((1, 1, 3)): rng.choice((4, 0, 2**40, 1e300)) for _ in range(9)
        }
        write_text(config, json.dumps(fields))
    if kind in (2, 4, 5):
        weights.write_bytes(mutate_bytes(rng, weights.read_bytes()))
    if kind >= 6:
        tensors = load(weights.read_bytes())
        name = rng.choice(sorted(tensors))
        values = tensors.pop(name)
        with np.errstate(all="ignore"):
            values = rng.choice(
                (
                    values * np.float32(rng.choice((0.0, 1e30, -1e9, float("nan")))),
                    values.astype(rng.choice((np.float16, np.float64, np.int8))),
                    np.ascontiguousarray(values[: rng.randrange(len(values) + 1)]),
                    values.reshape(-1),
                    np.ascontiguousarray(values.T),
                )
            )
        names = (name, f"{name}\n", name.replace(".1.", ".7."), "lm_head.weight", name.replace("A", "B"), "x" * 3000)
        tensors[rng.choice(names)] = values
        weights.write_bytes(save(tensors))


def _attempt_adapter(path: Path) -> str:
    output = path.parent / "converted.safetensors"
    output.unlink(missing_ok=True)
    try:
        convert_adapter(path, BASE, output, bits=4)
        adapter = load_adapter(output, "x", BASE.slots, BASE.identity)
        for module in adapter.modules.values():
            assert all(np.isfinite(dequantize(side)).all() for side in (module.a, module.b))
            assert np.isfinite(module.scaling).all()
    finally:
        output.unlink(missing_ok=True)
    return "accepted"


def _write_gguf(path: Path, architecture: str, fields: dict[str, Any], tensors: dict[str, npt.NDArray[Any]]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds: dict[type, Callable[..., None]] = {
                str: writer.add_string,
                int: writer.add_uint32,
                float: writer.add_float32,
            }
            kinds[type(value)](key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_GGUF_MODULES = {"q_proj": "attn_q", "v_proj": "attn_v", "down_proj": "ffn_down"}


def _prepare_gguf_lora(folder: Path) -> None:
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    tensors = {f"blk.{n}.{_GGUF_MODULES[m]}.weight.lora_{s.lower()}": v for (n, m, s), v in _factors().items()}
    _write_gguf(folder / "a.gguf", "llama", fields, tensors)


def _prepare_gguf_base(folder: Path) -> None:
    tokens = json.loads(tokenizer_texts()[0])["model"]["vocab"]
    texts = [*sorted(tokens, key=tokens.__getitem__), "<s>", "</s>"]
    fields: dict[str, Any] = {
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": _HIDDEN,
        "llama.feed_forward_length": _INNER,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": len(texts),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [1] * (len(texts) - 2) + [3, 3],
        "tokenizer.ggml.merges": ["h e", "l l", "Ġ w", "he ll"],
        "tokenizer.ggml.bos_token_id": len(texts) - 2,
        "tokenizer.ggml.eos_token_id": len(texts) - 1,
        "tokenizer.chat_template": TEMPLATE,
    }
    rng = np.random.default_rng(0)
    places = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    places |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    tensors = {f"blk.0.{place}.weight": rng.standard_normal(_WIDTHS[m][::-1]) for m, place in places.items()}
    tensors |= {"blk.0.attn_norm.weight": np.ones(_HIDDEN), "blk.0.ffn_norm.weight": np.ones(_HIDDEN)}
    tensors |= {"token_embd.weight": rng.standard_normal((len(texts), _HIDDEN)), "output_norm.weight": np.ones(_HIDDEN)}
    _write_gguf(folder / "b.gguf", "llama", fields, {k: v.astype(np.float32) for k, v in tensors.items()})


def _mutate_gguf(rng: random.Random, folder: Path) -> None:
    """Damage to the header, which is in front, more often than to the numbers."""
    (path,) = folder.glob("*.gguf")
    content = path.read_bytes()
    size = len(content) if rng.random() < 0.1 else min(len(content), 12_000 if path.name == "b.gguf" else 1600)
    path.write_bytes(mutate_bytes(rng, content[:size]) + content[size:])


def _prepare_folder(folder: Path) -> None:
    tokenizer = byte_level()
    count = tokenizer.get_vocab_size()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": count,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "tie_word_embeddings": True,
        "bos_token_id": count - 2,
        "eos_token_id": count - 1,
    }
    tensors = {f"{_path(0, module)}.weight": np.zeros(sizes[::-1], np.float32) for module, sizes in _WIDTHS.items()}
    norms = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm")
    tensors |= {f"{name}.weight": np.ones(_HIDDEN, np.float32) for name in norms}
    tensors["model.embed_tokens.weight"] = np.zeros((count, _HIDDEN), np.float32)
    write_text(folder / "config.json", json.dumps(config))
    write_text(folder / "generation_config.json", json.dumps({"eos_token_id": [count - 1]}))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    write_text(folder / "tokenizer_config.json", json.dumps(settings))
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def _prepare_encoder(folder: Path) -> None:
    modules = [
        {"type": f"sentence_transformers.models.{t}", "path": p} for t, p in (("Transformer", ""), ("Pooling", "p"))
    ]
    config = {"model_type": "bert", "hidden_size": _HIDDEN, "max_position_embeddings": 64}
    pooling = {"word_embedding_dimension": _HIDDEN, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "p").mkdir()
    for name, value in (
        ("config.json", config),
        ("modules.json", modules),
        ("p/config.json", pooling),
        ("sentence_bert_config.json", {"max_seq_length": 32}),
    ):
        write_text(folder / name, json.dumps(value))
    write_text(folder / "tokenizer.json", tokenizer_texts()[1])
    (folder / "model.safetensors").write_bytes(save({"x": np.zeros(2, np.float32)}))


def _mutate_documents(rng: random.Random, folder: Path) -> None:
    """Damage to one or two of a folder's JSON files, or now and then to its weights."""
    if rng.random() < 0.1:
        path = folder / "model.safetensors"
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return
    for path in rng.sample(sorted(folder.rglob("*.json")), rng.choice((1, 1, 2))):
        write_text(path, mutate_json_text(rng, path.read_text(encoding="utf-8")))


def _attempt_base(path: Path) -> str:
    base = open_base(path)
    assert base.weights.config.vocabulary > 0
    return "accepted"


def _attempt_encoder(folder: Path) -> str:
    spec = describe_encoder(folder, "int8", 4)
    assert 0 < spec.max_length <= 1 << 20
    return "accepted"


TARGETS = (
    Target("peft", "cheap", _prepare_peft, _mutate_adapter, _attempt_adapter, seconds=60.0),
    Target("mlx", "cheap", _prepare_mlx, _mutate_adapter, _attempt_adapter),
    Target("gguf-lora", "cheap", _prepare_gguf_lora, _mutate_gguf, lambda folder: _attempt_adapter(folder / "a.gguf")),
    Target("gguf-base", "cheap", _prepare_gguf_base, _mutate_gguf, lambda folder: _attempt_base(folder / "b.gguf")),
    Target("base-folder", "cheap", _prepare_folder, _mutate_documents, _attempt_base),
    Target("encoder-folder", "cheap", _prepare_encoder, _mutate_documents, _attempt_encoder),
)
