"""Float factors of LoRA adapters by module and layer: the common form of all readers and writers."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.records import read_json
from edgecompose.bundle.specs import BaseSpec, SlotGroup
from edgecompose.errors import AdapterError, CheckpointError, SlotMismatch, UnsupportedAdapter
from edgecompose.formats.architectures import MODULE_AT, PACKED
from edgecompose.formats.checkpoint import read_shard, to_float32

Float = npt.NDArray[np.float32]
#: Module -> factors A (L, R, n_in) and B (L, R, n_out) of a blend.
Factors = Mapping[str, tuple[Float, Float]]
Side = Literal["A", "B"]
#: PEFT and mlx_lm both call it so.
CONFIG_FILE = "adapter_config.json"
_PLACE = re.compile(r"^((?:.*?\.)?)(\d+)\.((?:.*\.)?(\w+))$")
#: What safetensors calls the types of numbers that factors may have.
_TYPES = ("F64", "F32", "F16", "BF16")
#: Ranks, scales and values of factors that no adapter exceeds.
LARGEST_RANK, _LARGEST_SCALE, _LARGEST_FACTOR = 1 << 14, 1_000_000, 65504.0
_LONGEST_NAME = 500
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
    """An adapter as its reader gives it; `about` says where it comes from."""

    name: str
    pairs: Pairs
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """One factor of an adapter file: `path` is the whole name of the module, for messages and patterns."""

    path: str
    module: str
    layer: int
    side: Side
    values: Float


def read_adapter_config(folder: Path) -> Any:
    """The JSON in `adapter_config.json`, whatever it is.

    Raises:
        AdapterError: the file is absent, or not JSON.
    """
    advice = "give a PEFT LoRA folder, an mlx_lm adapter folder or a GGUF LoRA file"
    return read_json(folder / CONFIG_FILE, AdapterError, advice, place=f"adapter '{folder}': {CONFIG_FILE}")


def read_tensors(path: Path, adapter: str) -> Iterator[tuple[str, Float]]:
    """Every tensor of a safetensors file as float32, one at a time.

    Raises:
        AdapterError: the file cannot be read.
        UnsupportedAdapter: a tensor holds other numbers than floats of 16 to 64 bits.
    """
    try:
        shard = read_shard(path)
        for tensor in shard.tensors:
            check_name(adapter, tensor.name)
            if tensor.dtype not in _TYPES:
                raise UnsupportedAdapter(
                    f"adapter '{adapter}': '{tensor.name}' is of type {tensor.dtype}, expected one of "
                    f"{', '.join(_TYPES)}; save the adapter in float32"
                )
        with path.open("rb") as stream:
            for tensor in shard.tensors:
                stream.seek(shard.data + tensor.start)
                content = stream.read(tensor.end - tensor.start)
                yield tensor.name, to_float32(content, tensor.dtype).reshape(tensor.shape)
    except (OSError, CheckpointError) as error:
        raise AdapterError(f"adapter '{adapter}': {path.name} cannot be read: {error}") from error


def check_name(adapter: str, name: str) -> None:
    """Refuse a tensor whose name could not stand in a message.

    Raises:
        UnsupportedAdapter: it has characters that cannot be shown, or very many.
    """
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise UnsupportedAdapter(f"adapter '{adapter}' holds tensors that have no slot: {name!r:.80}; save it again")


def check_scale(adapter: str, name: str, value: Any) -> None:
    """Refuse a scale, or a number that scales are made of, that is none.

    Raises:
        AdapterError: it is no finite number of at most a million.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST_SCALE <= value <= _LARGEST_SCALE:
        raise AdapterError(
            f"adapter '{adapter}': {value!r:.60} is no usable {name}; give a number of at most {_LARGEST_SCALE:,}"
        )


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
    factors: dict[tuple[str, int, str], dict[Side, Float]] = {}
    for half in halves:
        sides = factors.setdefault((half.module, half.layer, half.path), {})
        if half.side in sides:
            raise UnsupportedAdapter(f"adapter '{adapter}' has two factors for '{half.path}'; expected one adapter")
        sides[half.side] = half.values
    pairs: dict[str, dict[int, LoraPair]] = {}
    for (module, layer, path), sides in factors.items():
        layers = pairs.setdefault(module, {})
        if layer in layers:
            raise UnsupportedAdapter(
                f"adapter '{adapter}' has two modules '{module}' in layer {layer} ('{path}' is one); "
                "only one decoder can be adapted"
            )
        if len(sides) < 2:
            raise AdapterError(f"adapter '{adapter}': '{path}' has lora_{''.join(sides)} alone")
        a, b = sides["A"], sides["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape) or len(a) > LARGEST_RANK:
            raise AdapterError(f"adapter '{adapter}': '{path}' has factors of shapes {a.shape} and {b.shape}")
        if not all(np.abs(factor).max() <= _LARGEST_FACTOR for factor in (a, b)):  # NaN is not
            raise AdapterError(
                f"adapter '{adapter}': '{path}' holds values that are not finite (NaN or infinity), or beyond "
                f"{_LARGEST_FACTOR:g}; train it again"
            )
        layers[layer] = LoraPair(a, b, scale_of(path, a.shape[0]))
    if not pairs:
        raise AdapterError(f"adapter '{adapter}' holds no LoRA factor")
    return pairs


def split_packed(pairs: Pairs, groups: Mapping[str, SlotGroup]) -> Pairs:
    """A packed projection (qkv_proj, gate_up_proj) as one pair a part: the same A, its rows of B.

    Args:
        groups: the slots of the base, by module.

    Raises:
        SlotMismatch: the packed projection has another width than the parts of the base.
    """
    result = dict(pairs)
    for packed, parts in PACKED.items():
        if packed not in pairs or any(part not in groups for part in parts):
            continue
        layers = result.pop(packed)
        width = sum(groups[part].n_out for part in parts)
        wrong = [
            f"'layers.{layer}.{packed}' is {width} wide in this base, {pair.b.shape[0]} in the adapter"
            for layer, pair in sorted(layers.items())
            if pair.b.shape[0] != width
        ]
        if wrong:
            raise SlotMismatch(f"adapter does not fit this base: {'; '.join(wrong)}; use the base that it is for")
        start = 0
        for part in parts:
            end = start + groups[part].n_out
            result[part] = {layer: LoraPair(pair.a, pair.b[start:end], pair.scale) for layer, pair in layers.items()}
            start = end
    return result


def model_factors(factors: Factors, base: BaseSpec, modules: Container[str]) -> Factors:
    """Factors for the modules of a model, of transformers or in a GGUF file.

    Where it packs several into one, A holds the ranks of all parts one after another, and B is zero but for the columns
    of each part at its ranks: the update is the same.

    Args:
        base: says how wide the parts of packed modules are.
        modules: those that the model has, such as `Architecture.paths`.
    """
    groups, result = {group.name: group for group in base.slots}, dict(factors)
    for packed, parts in PACKED.items():
        present = [part for part in parts if part in factors]
        if packed not in modules or not present:
            continue
        a = np.concatenate([factors[part][0] for part in present], axis=1)
        b = np.zeros((*a.shape[:2], sum(groups[part].n_out for part in parts)), np.float32)
        row = column = 0
        for part in parts:
            if part in factors:
                own = result.pop(part)[1]
                b[:, row : row + own.shape[1], column : column + own.shape[2]] = own
                row += own.shape[1]
            column += groups[part].n_out
        result[packed] = (a, b)
    return result
