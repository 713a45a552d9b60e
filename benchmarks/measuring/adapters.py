"""Random adapters at the shapes of real models: speed depends on shapes, not on values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgecompose.bundle.adapter import Adapter, AdapterModule
from edgecompose.bundle.quantization import Bits, QuantizedFactor, quantize
from edgecompose.bundle.specs import SlotGroup
from edgecompose.merging.sparsify import thresholds

#: Layers, hidden, intermediate, key-value width.
SHAPES = {
    "smollm2-135m": (30, 576, 1536, 192),
    "llama-1b": (16, 2048, 8192, 512),
    "llama-8b": (32, 4096, 14336, 1024),
}


def slot_groups(shapes: str, layers: int | None) -> tuple[SlotGroup, ...]:
    """The seven linear modules of a Llama of these shapes."""
    all_layers, hidden, inner, narrow = SHAPES[shapes]
    widths = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, narrow),
        "v_proj": (hidden, narrow),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    return tuple(SlotGroup(name, layers or all_layers, *sizes) for name, sizes in widths.items())


def random_adapter(seed: int, groups: Sequence[SlotGroup], *, rank: int, bits: Bits) -> Adapter:
    """Uniform codes and scales; quick to draw at any size."""
    rng = np.random.default_rng(seed)
    modules = {}
    for group in groups:
        a, b = (_random_factor(rng, (group.layers, rank, width), bits) for width in (group.n_in, group.n_out))
        modules[group.name] = _module(a, b, scaling=np.full(group.layers, 2, np.float32))
    return Adapter(f"a{seed}", modules, bits=bits, base="", digest=f"{seed}-{rank}-{bits}")


def _random_factor(rng: np.random.Generator, shape: tuple[int, int, int], bits: Bits) -> QuantizedFactor:
    layers, rank, width = shape
    if bits == 16:
        return quantize(rng.random(shape, np.float32) - np.float32(0.5), 16)
    codes = rng.integers(0, 256, (layers, rank, width if bits == 8 else width // 2), dtype=np.uint8)
    if bits == 8:
        codes = np.maximum(codes, 1)
    scales = (rng.random((layers, rank, width // 32)) + 0.5).astype(np.float16)
    return QuantizedFactor(codes=codes, scales=scales, gain=1e-3, bits=bits)


def gaussian_adapter(name: str, groups: Sequence[SlotGroup], *, rank: int, bits: Bits) -> Adapter:
    """Gaussian factors, quantised; the layers are scaled differently. The name is the seed."""
    rng, modules = np.random.default_rng(list(name.encode())), {}
    for group in groups:
        a, b = (
            quantize((rng.standard_normal((group.layers, rank, width)) * 0.01).astype(np.float32), bits)
            for width in (group.n_in, group.n_out)
        )
        modules[group.name] = _module(a, b, scaling=np.linspace(0.5, 2, group.layers, dtype=np.float32))
    return Adapter(name, modules, bits=bits, base="", digest=f"{name}-{rank}-{bits}")


def _module(a: QuantizedFactor, b: QuantizedFactor, *, scaling: np.ndarray) -> AdapterModule:
    layers, rank = a.codes.shape[:2]
    return AdapterModule(
        a=a,
        b=b,
        scaling=scaling,
        ranks=np.full(layers, rank, np.int32),
        thresholds=np.stack([thresholds(a), thresholds(b)]),
    )


def stored_bytes(adapters: Sequence[Adapter]) -> int:
    """Bytes of the codes and scales of all adapters."""
    return sum(f.codes.nbytes + f.scales.nbytes for a in adapters for m in a.modules.values() for f in (m.a, m.b))
