"""The blends of a bundle's first three adapters, for our decoder and for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.measuring.llama import LlamaCpp
from benchmarks.measuring.prompts import SHORT_PROMPT
from edgecompose import Composer, MergeSettings, Request
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.merged import MergedAdapter
from edgecompose.formats.gguf import write_gguf_lora

Blends = Mapping[str, MergedAdapter]
#: Share of the blend's squared norm that `three_adapters_svd` keeps.
_ENERGY = 0.99
_LORA_BLENDS = ("one_adapter", "three_adapters")


def three_adapters(composer: Composer) -> list[str]:
    """Names of the bundle's first three adapters."""
    return sorted(composer.bundle.manifest.adapters)[:3]


def compose_blends(composer: Composer) -> dict[str, MergedAdapter]:
    """No adapter, one, three, and three cut to the rank that keeps most of their energy."""
    names = three_adapters(composer)
    weights = dict.fromkeys(names, 1 / 3)
    requests = {
        "one_adapter": Request(weights={names[0]: 1.0}),
        "three_adapters": Request(weights=weights),
        "three_adapters_svd": Request(weights=weights, merge=MergeSettings("svd", energy=_ENERGY)),
    }
    merged = {name: composer.compose(SHORT_PROMPT, request).merged for name, request in requests.items()}
    return {"base_alone": MergedAdapter({}, "base"), **merged}


def write_loras(blends: Blends, base: BaseSpec, folder: Path) -> dict[str, Path]:
    """The blends of one and of three adapters as LoRA files of llama.cpp."""
    return {name: write_gguf_lora(blends[name], folder / f"{name}.gguf", base) for name in _LORA_BLENDS}


def llama_variants(gguf: Path, loras: Mapping[str, Path]) -> dict[str, LlamaCpp]:
    """llama.cpp without an adapter and with each of the LoRA files, by the names of the results."""
    files: dict[str, Path | None] = {"base_alone": None, **loras}
    return {f"llama_cpp_{name}": LlamaCpp(gguf, lora) for name, lora in files.items()}
