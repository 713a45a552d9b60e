"""Where the tensors of a decoder lie in files: by the names of Hugging Face folders, and by those of GGUF files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgecompose.formats.architectures import MODULES, PACKED
from edgecompose_export.decoder.config import DecoderConfig

EMBEDDING, HEAD, FINAL_NORM = "embedding.weight", "head.weight", "final_norm.weight"
_HF_NORMS = {
    "before": {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
    "after": {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
    "around": {
        "attention_in": "input_layernorm",
        "attention_out": "post_attention_layernorm",
        "mlp_in": "pre_feedforward_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
}
_GGUF_NORMS = {
    "attention_in": "attn_norm",
    "attention_out": "post_attention_norm",
    "mlp_in": "ffn_norm",
    "mlp_out": "post_ffw_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the decoder lies.

    Attributes:
        stored: name of the tensor in the file, which may hold others too.
        first: its first row there.
        shape: of the tensor of the decoder.
        heads: number of heads whose rows have rotary pairs side by side, 0 where the rows need no reordering.
        plus: is added to the stored numbers.
    """

    stored: str
    first: int
    shape: tuple[int, ...]
    heads: int = 0
    plus: float = 0.0


def tensor_names(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a decoder and its shape, in the order of computation."""
    hidden, widths = config.hidden, config.widths
    layer_norm = config.architecture.norm == "layer"
    yield EMBEDDING, (config.vocabulary, hidden)
    for layer in range(len(config.layers)):
        for norm in config.norms:
            yield f"{layer}.{norm}.weight", (hidden,)
            if layer_norm:
                yield f"{layer}.{norm}.bias", (hidden,)
        if config.architecture.query_key_norm != "none":
            whole = config.architecture.query_key_norm == "width"
            yield f"{layer}.q_norm.weight", (widths["q_proj"][0] if whole else config.head_size,)
            yield f"{layer}.k_norm.weight", (widths["k_proj"][0] if whole else config.head_size,)
        for module in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            yield f"{layer}.{module}.weight", widths[module]
            if module in config.biases:
                yield f"{layer}.{module}.bias", widths[module][:1]
    yield FINAL_NORM, (hidden,)
    if layer_norm:
        yield FINAL_NORM.replace("weight", "bias"), (hidden,)
    if not config.tied:
        yield HEAD, (config.vocabulary, hidden)


def linear_tensors(config: DecoderConfig) -> list[str]:
    """The weights of all linear modules, in the order of computation."""
    return [f"{layer}.{module}.weight" for layer in range(len(config.layers)) for module in MODULES]


def folder_places(config: DecoderConfig) -> dict[str, Place]:
    """Where each tensor of a decoder lies in a Hugging Face folder."""
    row = config.architecture
    top = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    norms = dict(_HF_NORMS[row.norms], q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    plus = 1.0 if row.unit_offset else 0.0
    return _places(config, top, block="model.layers.{}.", norms=norms, paths=row.paths, interleaved=False, plus=plus)


def gguf_places(config: DecoderConfig) -> dict[str, Place]:
    """Where each tensor of a decoder lies in a GGUF file."""
    row = config.architecture
    top = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}
    return _places(
        config,
        top,
        block="blk.{}.",
        norms=_GGUF_NORMS,
        paths=row.gguf_paths,
        interleaved=row.interleaved,
        plus=0.0,
    )


def _places(
    config: DecoderConfig,
    top: Mapping[str, str],
    *,
    block: str,
    norms: Mapping[str, str],
    paths: Mapping[str, str],
    interleaved: bool,
    plus: float,
) -> dict[str, Place]:
    """The places of a decoder's tensors under one scheme of names.

    Args:
        top: names of the tensors outside blocks, without their ends.
        block: prefix of a block's tensors, with `{}` for its number.
        norms, paths: names of norms and of linear modules in a block.
        interleaved: queries and keys have rotary pairs side by side.
        plus: is added to the weights of norms.
    """
    places = {}
    for name, shape in tensor_names(config):
        parts, end = name.rsplit(".", 1)
        if parts in top:
            norm = parts == "final_norm"
            places[name] = Place(f"{top[parts]}.{end}", 0, shape, plus=plus if norm else 0.0)
            continue
        layer, part = parts.split(".")
        prefix = block.format(layer)
        if part in norms:
            places[name] = Place(f"{prefix}{norms[part]}.{end}", 0, shape, plus=plus)
            continue
        path, first = _packed_place(paths, part, config)
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(part, 0) if interleaved else 0
        places[name] = Place(f"{prefix}{path}.{end}", first, shape, heads=heads)
    return places


def _packed_place(paths: Mapping[str, str], module: str, config: DecoderConfig) -> tuple[str, int]:
    """Path of the tensor that holds a linear module, and the module's first row there."""
    if module in paths:
        return paths[module], 0
    for whole, parts in PACKED.items():
        if module in parts and whole in paths:
            return paths[whole], sum(config.widths[part][0] for part in parts[: parts.index(module)])
    raise KeyError(module)
