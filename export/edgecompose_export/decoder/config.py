"""The configuration of a decoder, as its graph needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgecompose.errors import ExportError
from edgecompose.formats.architectures import PACKED, Architecture
from edgecompose_export.decoder.rotary import Rotary

Activation = Literal["silu", "gelu", "gelu_tanh"]
#: Names of transformers, and the activations that they mean.
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
#: Largest number of layers.
MOST_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Layer:
    """One block.

    Attributes:
        window: how many of the newest tokens it attends to, None for all.
        rotary: index of its rotation, None for a block without positions.
    """

    window: int | None
    rotary: int | None


@dataclass(frozen=True, slots=True, eq=False)
class DecoderConfig:
    """A decoder, as its graph needs it.

    Attributes:
        architecture: the row of the table.
        context: largest number of tokens.
        rotaries: rotations that layers point to.
        tied: embedding and output layer are the same weights.
        biases: linear modules that have one.
        attention_scale: factor of the products of queries and keys.
        attention_softcap, logit_softcap: c in c tanh(x / c), 0 for none.
        embedding_multiplier, residual_multiplier, logit_divisor: factors of embeddings and of what is added to the
            stream, and what logits are divided by.
        parallel: attention and MLP read the same norm and are added together.
    """

    architecture: Architecture
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    layers: tuple[Layer, ...]
    rotaries: tuple[Rotary, ...]
    epsilon: float
    activation: Activation
    tied: bool
    biases: frozenset[str]
    attention_scale: float
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0
    parallel: bool = False

    def __post_init__(self) -> None:
        numbers = {
            name: getattr(self, name)
            for name in ("vocabulary", "hidden", "intermediate", "heads", "kv_heads", "head_size", "context")
        }
        bad = [f"{name} {value}" for name, value in numbers.items() if value < 1]
        if bad or not self.layers:
            raise ExportError(f"the base has {', '.join(bad) or 'no layer'}; its configuration is damaged")
        if self.heads % self.kv_heads:
            raise ExportError(f"{self.heads} query heads cannot share {self.kv_heads} key heads; expected a divisor")
        factors = ("epsilon", "attention_scale", "embedding_multiplier", "residual_multiplier", "logit_divisor")
        bad = [f"{name} {value!r:.40}" for name in factors if not is_positive(value := getattr(self, name))]
        caps = ("attention_softcap", "logit_softcap")
        bad += [f"{name} {value!r:.40}" for name in caps if (value := getattr(self, name)) and not is_positive(value)]
        if bad:
            raise ExportError(f"the base has {', '.join(bad)}, expected positive numbers; its configuration is damaged")
        rotated = max(2 * rotary.pairs for rotary in self.rotaries)
        if rotated > self.head_size:
            raise ExportError(
                f"{rotated} values of a head rotate, expected at most {self.head_size}; the configuration is damaged"
            )
        windows = [layer.window for layer in self.layers if layer.window is not None and layer.window < 1]
        if windows:
            raise ExportError(
                f"a layer attends to {windows[0]} tokens, expected 1 or more; the configuration is damaged"
            )

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Linear module -> (n_out, n_in), packed modules too."""
        query, key, inner = self.heads * self.head_size, self.kv_heads * self.head_size, self.intermediate
        widths = {
            "q_proj": (query, self.hidden),
            "k_proj": (key, self.hidden),
            "v_proj": (key, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (inner, self.hidden),
            "up_proj": (inner, self.hidden),
            "down_proj": (self.hidden, inner),
        }
        for packed, parts in PACKED.items():
            widths[packed] = (sum(widths[part][0] for part in parts), self.hidden)
        return widths

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that a block has, out of `attention_in`, `attention_out`, `mlp_in` and `mlp_out`."""
        before, after = ("attention_in", "mlp_in"), ("attention_out", "mlp_out")
        if self.parallel:
            return ("attention_in",)
        return {"before": before, "after": after, "around": before + after}[self.architecture.norms]

    @property
    def long_from(self) -> int | None:
        """Number of tokens beyond which other frequencies apply, None where length does not matter."""
        return next((r.long_from for r in self.rotaries if r.long_from is not None), None)


def is_positive(value: Any) -> bool:
    """Whether a number is one of float32 and more than 0."""
    return isinstance(value, int | float) and 0 < value < 1e38


def activation_of(name: Any) -> Activation:
    """The activation that transformers calls by a name.

    Raises:
        ExportError: it cannot be exported.
    """
    if name not in _ACTIVATIONS:
        raise ExportError(f"the activation {name!r:.40} is not exported; {', '.join(_ACTIVATIONS)} are")
    return _ACTIVATIONS[name]


def refuse_parts(row: Architecture, fields: Mapping[str, Any]) -> None:
    """Refuse a configuration whose fields name a part that the architecture's row refuses.

    Raises:
        ExportError: a field of `row.refused` is true.
    """
    for name, part in row.refused.items():
        if fields.get(name):
            raise ExportError(f"a {row.name} with {part} is not exported ({name}); give a base without")
