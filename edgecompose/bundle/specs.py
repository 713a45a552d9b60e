"""The parts of a manifest, as frozen values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from edgecompose.errors import ManifestInvalid

PromptForm = Literal["chat", "raw"]
Verdict = Literal["helps", "unproven", "hurts"]
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Hash and size (bytes) of one file of the bundle."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ManifestInvalid(f"sha256 '{self.sha256}' is not 64 hexadecimal digits")
        if self.bytes < 0:
            raise ManifestInvalid(f"a file size of {self.bytes} bytes is negative")


@dataclass(frozen=True, slots=True)
class SlotGroup:
    """One linear module of every layer: A is (r, n_in), B is (r, n_out)."""

    name: str
    layers: int
    n_in: int
    n_out: int

    def __post_init__(self) -> None:
        if min(self.layers, self.n_in, self.n_out) < 1:
            raise ManifestInvalid(f"slot group '{self.name}' has a size below 1")
        if not self.name.isidentifier():
            raise ManifestInvalid(f"slot group {self.name!r} is not a plain name")


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a base is from the float values of the file that it was exported from.

    `kl` is the mean KL divergence (nats) of the next-token distribution, `top1` the share of positions with the same
    most likely token, over `positions` positions of `prompts` prompts. `nll` is the mean negative log-likelihood
    (nats) of the prompts' next tokens, `nll_float` that of the float values.
    """

    kl: float
    top1: float
    prompts: int
    positions: int
    nll: float | None = None
    nll_float: float | None = None


@dataclass(frozen=True, slots=True)
class FusingSpec:
    """The graphs that fuse a blend into a float base: one gives the fused weights, one decodes with them.

    `weights` are the fused ones, float32, in panels of columns: name -> (panels, n_in, columns of a panel).
    `cuda_decoder_graph` is the second with attention in float16, as `BaseSpec.cuda_graph`.
    """

    fuse_graph: str
    decoder_graph: str
    weights: dict[str, tuple[int, ...]]
    cuda_decoder_graph: str | None = None

    def __post_init__(self) -> None:
        bad = [name for name, shape in self.weights.items() if len(shape) != 3 or min(shape) < 1]
        if bad or not self.weights:
            raise ManifestInvalid(f"fusing names no weight, or one without panels: {', '.join(bad[:4])}")


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The decoder graph and its properties; only float bases have `fusing`.

    `cuda_graph` is the decoder with attention in float16, the only type that CUDA has attention kernels for.
    `architecture` is what transformers calls its kind, such as 'llama'. A sequence of more than `long_from` tokens is
    read with other rotary frequencies than a shorter one (LongRoPE); None where length does not matter.
    """

    graph: str
    tokenizer: str
    identity: str
    precision: str
    context: int
    kv_heads: int
    head_size: int
    vocabulary: int
    end_tokens: tuple[int, ...]
    slots: tuple[SlotGroup, ...]
    chat_template: str | None = None
    distance: Distance | None = None
    source: str = ""
    fusing: FusingSpec | None = None
    cuda_graph: str | None = None
    architecture: str | None = None
    long_from: int | None = None

    def __post_init__(self) -> None:
        names = [group.name for group in self.slots]
        if not names or len(set(names)) != len(names):
            raise ManifestInvalid(f"the base has no adapter slots, or one twice: {', '.join(names)}")
        if min(self.context, self.kv_heads, self.head_size, self.vocabulary) < 1:
            raise ManifestInvalid("context, kv_heads, head_size and vocabulary of the base must be at least 1")

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return max(group.layers for group in self.slots)


@dataclass(frozen=True, slots=True)
class EmbedderSpec:
    """The sentence encoder: pooling, length in tokens, and whether vectors have unit norm.

    `pooling` is a name of the table in `retrieval.pooling`.
    `ends` > 0 appends the means of the first and of the last `ends` tokens to the pooled vector, so that `dimension` is
    three times the encoder's width. `cosine` is the mean cosine between its vectors and those of its float32 form.
    """

    graph: str
    tokenizer: str
    identity: str
    precision: str
    dimension: int
    max_length: int
    pooling: str
    normalize: bool
    ends: int = 0
    cosine: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        if self.dimension < 1 or self.max_length < 8 or self.ends < 0:
            raise ManifestInvalid(
                "the embedder is out of range; expected dimension >= 1, max_length >= 8 and ends >= 0"
            )
        if self.ends and self.dimension % 3:
            raise ManifestInvalid(f"an embedder with ends has {self.dimension} dimensions; expected a multiple of 3")


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """The USearch file: `vectors` cosine vectors of `dimension` in `dtype`, made by one embedder.

    `whitening` is the file of the map from the embedder's vectors to those of the index, None where they are the same.
    """

    file: str
    vectors: int
    dimension: int
    embedder: str
    dtype: Literal["f16", "f32"] = "f16"
    texts: str | None = None
    whitening: str | None = None


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One task: the adapters that it is mapped to, with weights, and the keys [first_key, first_key + examples).

    Usually that is the task's own adapter at weight 1. A task without adapters is answered by the base. `similarity` is
    the one that is typical among its examples (see `retrieval.resemblance`), None where it was not measured.
    """

    adapters: dict[str, float]
    first_key: int
    examples: int
    similarity: float | None = None

    def __post_init__(self) -> None:
        if self.first_key < 0 or self.examples < 0:
            raise ManifestInvalid("first_key and examples of a task must not be negative")
        if not all(math.isfinite(weight) for weight in self.adapters.values()):
            raise ManifestInvalid("a weight of a task's adapter is not finite")


@dataclass(frozen=True, slots=True)
class Validation:
    """What an adapter gains on its task's validation examples over the base alone.

    `verdict` is 'helps' or 'hurts' where the 95 % interval `ci95` of the gain lies above or below 0, else 'unproven'.
    """

    verdict: Verdict
    examples: int
    base: float
    accuracy: float
    ci95: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.ci95) != 2 or self.examples < 1:
            raise ManifestInvalid("validation lacks two ends of an interval, or at least one example")


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter file: largest rank, bits per weight, relative quantisation error, provenance, measured gain."""

    file: str
    rank: int
    bits: Literal[4, 8, 16]
    base: str
    error: float
    source: dict[str, Any] = field(default_factory=dict)
    validation: Validation | None = None
