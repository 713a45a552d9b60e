"""The blends of a bundle's first three adapters, for our decoder, for llama.cpp and for OpenVINO GenAI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.measuring.llama import LlamaCpp
from benchmarks.measuring.openvino import OpenVino
from benchmarks.measuring.prompts import SHORT_PROMPT
from edgecompose import Composer, MergeSettings, Request
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.merged import MergedAdapter
from edgecompose.formats.gguf import write_gguf_lora
from edgecompose.formats.peft import WEIGHTS_FILE, write_peft_folder

Blends = Mapping[str, MergedAdapter]
#: Share of the blend's squared norm that `three_adapters_svd` keeps.
_ENERGY = 0.99
_LORA_BLENDS = ("one_adapter", "three_adapters")
#: Weights of the three adapters.
WEIGHTS = (0.5, 0.3, 0.2)


def three_adapters(composer: Composer) -> list[str]:
    """Names of the bundle's first three adapters."""
    return sorted(composer.bundle.manifest.adapters)[:3]


def compose_blends(composer: Composer) -> dict[str, MergedAdapter]:
    """No adapter, one, the exact sum of three, and that sum cut to the rank that keeps most of its energy."""
    names = three_adapters(composer)
    weights, exact = dict(zip(names, WEIGHTS, strict=True)), MergeSettings("product")
    requests = {
        "one_adapter": Request(weights={names[0]: 1.0}, merge=exact),
        "three_adapters": Request(weights=weights, merge=exact),
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


def write_peft(composer: Composer, folder: Path) -> dict[str, Path]:
    """Each of the three adapters as a file of PEFT, by name; rank and alpha are equal."""
    files = {}
    for name in three_adapters(composer):
        request = Request(weights={name: 1.0}, merge=MergeSettings("product"))
        merged = composer.compose(SHORT_PROMPT, request).merged
        write_peft_folder(merged, folder / name, composer.bundle.manifest.base)
        files[name] = folder / name / WEIGHTS_FILE
    return files


def openvino_variants(folder: Path, adapters: Mapping[str, Path]) -> dict[str, OpenVino]:
    """OpenVINO GenAI without an adapter and with three, by the names of the results."""
    weighted = tuple(zip(adapters.values(), WEIGHTS, strict=True))
    return {"openvino_base_alone": OpenVino(folder), "openvino_three_adapters": OpenVino(folder, weighted)}
