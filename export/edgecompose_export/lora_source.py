"""What every reader of LoRA adapters gives: float factors by module and layer, whatever program wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors

from edgecompose.errors import AdapterError, UnsupportedAdapter
from edgecompose.formats.architectures import MODULE_AT

Float = npt.NDArray[np.float32]
#: The formats of adapters: a PEFT folder, an mlx_lm folder, a LoRA file of llama.cpp.
Kind = Literal["peft", "mlx", "gguf"]
Side = Literal["A", "B"]
#: PEFT and mlx_lm both call it so.
CONFIG_FILE = "adapter_config.json"
_PLACE = re.compile(r"^((?:.*?\.)?)(\d+)\.((?:.*\.)?(\w+))$")
#: Parts of multimodal models that have layers of the same names.
_OTHER_TOWER = re.compile(r"vision|visual|audio")
#: What transformers and GGUF files call embeddings and the output layer.
_VOCABULARY = frozenset({"embed_tokens", "lm_head", "token_embd", "output"})


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """Float factors of one module in one layer: a (r, in), b (out, r); the update of the weight is scale * b a."""

    a: Float
    b: Float
    scale: float


#: Module name -> layer -> factors.
Pairs = Mapping[str, Mapping[int, LoraPair]]


@dataclass(frozen=True, slots=True, eq=False)
class LoraSource:
    """An adapter as it was read: `about` is what the exported file says of where it comes from."""

    name: str
    kind: Kind
    pairs: Pairs
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """One factor where it was found: `path` is the whole name of the module, for messages and patterns."""

    path: str
    module: str
    layer: int
    side: Side
    values: Float


def read_adapter_config(folder: Path) -> Any:
    """The JSON in `adapter_config.json`, whatever it is.

    Raises:
        AdapterError: absent, or not JSON.
    """
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"adapter '{folder}' has no readable {CONFIG_FILE} ({error}); give a PEFT LoRA folder, an mlx_lm adapter "
            "folder or a GGUF LoRA file"
        ) from error


def read_tensors(path: Path, adapter: str) -> Iterator[tuple[str, Float]]:
    """Every tensor of a safetensors file as float32 (torch reads it, since numpy has no bfloat16).

    Raises:
        AdapterError: the file cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                yield key, np.asarray(file.get_tensor(key).float().numpy(), np.float32)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"adapter '{adapter}': {path.name} cannot be read: {error}") from error


def place_of(path: str) -> tuple[str, int] | None:
    """Module and layer of a path such as `model.layers.0.self_attn.q_proj`, None outside of the text decoder."""
    match = _PLACE.match(path)
    if match is None or _OTHER_TOWER.search(match[1]):
        return None
    return MODULE_AT.get(match[3], match[4]), int(match[2])


def is_of_vocabulary(path: str) -> bool:
    """Whether a module or tensor belongs to the embeddings or the output layer."""
    return not _VOCABULARY.isdisjoint(path.split("."))


def refuse_unknown(adapter: str, names: Iterable[str]) -> None:
    """Refuse an adapter that holds tensors which no slot could take.

    Raises:
        UnsupportedAdapter: `names` is not empty; some of it is shown.
    """
    unknown = sorted(names, key=lambda name: (not is_of_vocabulary(name), name))
    if unknown:
        shown = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        why = ""
        if is_of_vocabulary(unknown[0]):
            why = (
                "; it was trained with new tokens, or with an embedding or output layer of its own; "
                "train it on the linear modules of blocks alone"
            )
        raise UnsupportedAdapter(f"adapter '{adapter}' holds tensors that have no slot: {shown}{why}")


def pair_up(adapter: str, halves: Iterable[Half], scale_of: Callable[[str, int], float]) -> Pairs:
    """Factors by module and layer, each A with its B.

    Args:
        adapter: its name, for messages.
        scale_of: gives the scale of a module from its path and rank; may refuse them.

    Raises:
        AdapterError: a factor alone, shapes that do not go together, values that are not finite, or no factor at all.
        UnsupportedAdapter: two factors for one place.
    """
    found: dict[tuple[str, int, str], dict[Side, Float]] = {}
    for half in halves:
        sides = found.setdefault((half.module, half.layer, half.path), {})
        if half.side in sides:
            raise UnsupportedAdapter(f"adapter '{adapter}' has two factors for '{half.path}'; expected one adapter")
        sides[half.side] = half.values
    pairs: dict[str, dict[int, LoraPair]] = {}
    for (module, layer, path), sides in found.items():
        layers = pairs.setdefault(module, {})
        if layer in layers:
            raise UnsupportedAdapter(
                f"adapter '{adapter}' has two modules '{module}' in layer {layer} ('{path}' is one); "
                "only one decoder can be adapted"
            )
        if len(sides) < 2:
            raise AdapterError(f"adapter '{adapter}': '{path}' has lora_{''.join(sides)} alone")
        a, b = sides["A"], sides["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in a.shape:
            raise AdapterError(f"adapter '{adapter}': '{path}' has factors of shapes {a.shape} and {b.shape}")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise AdapterError(
                f"adapter '{adapter}': '{path}' holds values that are not finite (NaN or infinity); train it again"
            )
        layers[layer] = LoraPair(a, b, scale_of(path, a.shape[0]))
    if not pairs:
        raise AdapterError(f"adapter '{adapter}' holds no LoRA factor")
    return pairs
