"""LoRA factors of an adapter in all layers: reading, singular components, and errors of the update B A."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from edgecompose.formats.peft import WEIGHTS_FILE, PeftScales, read_config

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
_KEY = re.compile(r"^(?:base_model\.model\.)?(.*?\.(\d+)\..*?(\w+))\.lora_(A|B)\.weight$")


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Both factors of a module in all layers, rank-major: a (r, L, in), b (r, L, out) with the LoRA scale in it."""

    a: Float
    b: Float


#: Both factors by module.
Factors = Mapping[str, Pair]


def read_factors(folder: Path) -> dict[str, Pair]:
    """The factors of a PEFT folder whose layers have one rank.

    Raises:
        SystemExit: it holds other tensors.
    """
    scales = PeftScales(folder.name, read_config(folder))
    halves: dict[str, dict[int, Float]] = {}
    for key, tensor in load_file(folder / WEIGHTS_FILE).items():
        match = _KEY.match(key)
        if match is None:
            raise SystemExit(f"'{folder}' holds the tensor '{key}', which is not a factor of a decoder layer")
        scale = scales.scale(match[1]) if match[4] == "B" else 1.0
        rows = tensor.T * scale if match[4] == "B" else tensor
        halves.setdefault(match[3] + match[4], {})[int(match[2])] = np.asarray(rows, np.float32)
    stacked = {key: np.stack([layers[i] for i in sorted(layers)], axis=1) for key, layers in halves.items()}
    return {name: Pair(stacked[name + "A"], stacked[name + "B"]) for name in sorted({key[:-1] for key in stacked})}


def random_factors(shape: Factors, rank: int) -> dict[str, Pair]:
    """Gaussian factors of the widths and layers of another adapter: no component stands out."""
    rng = np.random.default_rng(0)

    def draw(like: Float) -> Float:
        return rng.standard_normal((rank, *like.shape[1:]), dtype=np.float32)

    return {name: Pair(draw(pair.a), draw(pair.b)) for name, pair in shape.items()}


def svd_form(pair: Pair) -> Pair:
    """The same products, as orthogonal components in falling order, both factors of equal norm."""
    a, b = (x.astype(np.float64).transpose(1, 2, 0) for x in (pair.a, pair.b))
    qa, ra = np.linalg.qr(a)
    qb, rb = np.linalg.qr(b)
    u, s, vt = np.linalg.svd(rb @ ra.transpose(0, 2, 1))
    root = np.sqrt(s)[:, None, :]
    parts = (qa @ vt.transpose(0, 2, 1) * root, qb @ u * root)
    return Pair(*(np.ascontiguousarray(x.transpose(2, 0, 1), np.float32) for x in parts))


def squared_norm(pair: Pair) -> float:
    """|B A|² over all layers, without forming a product."""
    a, b = (x.astype(np.float64).transpose(1, 0, 2) for x in (pair.a, pair.b))
    return float(((a @ a.transpose(0, 2, 1)) * (b @ b.transpose(0, 2, 1))).sum())


def relative_error(factors: Factors, stored: Factors) -> float:
    """|B A - B^ A^| / |B A|, both pooled over modules and layers."""
    error = sum(
        squared_norm(Pair(np.concatenate([p.a, stored[name].a]), np.concatenate([p.b, -stored[name].b])))
        for name, p in factors.items()
    )
    return math.sqrt(max(error, 0.0) / sum(squared_norm(p) for p in factors.values()))


def component_energy(factors: Factors) -> list[float]:
    """Share of |ΔW|² in the first, second, ... singular component, over all modules and layers."""
    energy = np.sum([component_norms(svd_form(p)).sum(1) for p in factors.values()], axis=0)
    return [float(share) for share in energy / energy.sum()]


def component_norms(pair: Pair) -> Double:
    """|b|² |a|² of each component, (r, L)."""
    return np.asarray(dot(pair.a, pair.a) * dot(pair.b, pair.b))


def dot(left: Float, right: Float) -> Double:
    """Inner products of rows, (r, L)."""
    return np.asarray(np.einsum("rln,rln->rl", left, right, dtype=np.float64))


def row_gain(rows: Float, values: Float) -> Double:
    """The factor by which each row of values has to grow to keep the length of the row that it stands for."""
    overlap = dot(rows, values)
    return np.where(overlap > 0, dot(rows, rows) / np.where(overlap > 0, overlap, 1), 1)
