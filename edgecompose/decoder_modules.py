"""The linear modules of a decoder block: where transformers puts them, and which of them it packs into one."""

from __future__ import annotations

_PARENT = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
#: Projections that hold the rows of several modules, and those modules in order.
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def module_path(layer: int, module: str) -> str:
    """Path of a linear module in a transformers model, such as `model.layers.0.self_attn.q_proj`."""
    return f"model.layers.{layer}.{_PARENT[module]}.{module}"
