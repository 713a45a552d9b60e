"""PEFT's `add_weighted_adapter` on the same adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgecompose.bundle.adapter import Adapter
from edgecompose.bundle.quantization import dequantize
from edgecompose.bundle.specs import SlotGroup

#: PEFT's method for each of ours that it has.
PEFT_METHODS = {
    "product": "cat",
    "linear": "linear",
    "ties": "ties",
    "magnitude_prune": "magnitude_prune",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
    "svd": "svd",
}


def peft_model(adapters: Sequence[Adapter], groups: Sequence[SlotGroup]) -> Any:
    """PEFT's LoRA layers with the dequantised factors, on linear modules whose weight takes no memory."""
    import peft

    model = _empty_model(groups)
    for adapter in adapters:
        config = peft.LoraConfig(r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules=[g.name for g in groups])
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter.name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=adapter.name)
        for group in groups:
            _fill(model, adapter, group)
    return model


def _empty_model(groups: Sequence[SlotGroup]) -> Any:
    """A stack of blocks of linear modules with shapes but without weights."""
    import torch

    class Block(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for group in groups:
                linear = torch.nn.Linear(1, 1, bias=False)
                linear.in_features, linear.out_features = group.n_in, group.n_out
                weight = torch.empty(1).expand(group.n_out, group.n_in)
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                setattr(self, group.name, linear)

    class Stack(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Block() for _ in range(groups[0].layers))
            self.config: dict[str, Any] = {}

    return Stack()


def _fill(model: Any, adapter: Adapter, group: SlotGroup) -> None:
    """Put the factors of one module into PEFT's layers."""
    import torch

    module = adapter.modules[group.name]
    a, b = dequantize(module.a), dequantize(module.b)
    for layer in range(group.layers):
        linear = getattr(model.base_model.model.layers[layer], group.name)
        linear.lora_A[adapter.name].weight.data = torch.from_numpy(a[layer].copy())
        linear.lora_B[adapter.name].weight.data = torch.from_numpy(np.ascontiguousarray(b[layer].T))


def peft_merge(model: Any, weights: dict[str, float], *, method: str, density: float, rank: int) -> None:
    """Merge adapters of a model by one of PEFT's methods and delete the result."""
    model.add_weighted_adapter(
        adapters=list(weights),
        weights=list(weights.values()),
        adapter_name="merged",
        combination_type=method,
        density=density,
        svd_rank=rank,
    )
    model.delete_adapter("merged")
