"""The linear modules of a decoder block: where transformers puts them, and which of them it packs into one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgecompose.manifest import BaseSpec

#: Module -> factors A (L, R, n_in) and B (L, R, n_out).
Factors = Mapping[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
#: Architectures whose models, in transformers and in GGUF, have packed projections.
_PACKING = frozenset({"phi3"})
_PARENT = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp", "qkv_proj": "self_attn", "gate_up_proj": "mlp",
}  # fmt: skip
#: Projections that hold the rows of several modules, and those modules in order.
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def module_path(layer: int, module: str) -> str:
    """Path of a linear module in a transformers model, such as `model.layers.0.self_attn.q_proj`."""
    return f"model.layers.{layer}.{_PARENT[module]}.{module}"


def model_factors(factors: Factors, base: BaseSpec) -> Factors:
    """Factors for the modules that the base's own model has.

    Where it packs several into one, A holds the ranks of all parts one after another, and B is zero but for the columns
    of each part at its ranks: the update is the same.
    """
    if base.architecture not in _PACKING:
        return factors
    groups, found = {group.name: group for group in base.slots}, dict(factors)
    for packed, parts in PACKED.items():
        present = [part for part in parts if part in factors]
        if not present:
            continue
        a = np.concatenate([factors[part][0] for part in present], axis=1)
        b = np.zeros((*a.shape[:2], sum(groups[part].n_out for part in parts)), np.float32)
        row = column = 0
        for part in parts:
            if part in factors:
                own = found.pop(part)[1]
                b[:, row : row + own.shape[1], column : column + own.shape[2]] = own
                row += own.shape[1]
            column += groups[part].n_out
        found[packed] = (a, b)
    return found
