"""The parts of a manifest, as frozen values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from edgecompose.errors import ManifestInvalid

PromptForm = Literal["chat", "raw"]
Verdict = Literal["helps", "unproven", "hurts"]
#: Element types that keys and values may be cached in; float16 is that of CUDA.
KVCacheType = Literal["float32", "int8", "int4"]
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Numbers up to here are exact in every language that reads JSON.
MOST_COUNT = 1 << 53
#: Bounds that no model comes near; they keep products of sizes within 64 bits.
MOST_TOKENS, MOST_VOCABULARY, MOST_WIDTH, MOST_LAYERS, MOST_HEADS = 1 << 24, 1 << 24, 1 << 20, 4096, 4096
MOST_DIMENSION, MOST_RANK = 1 << 16, 1 << 14
#: Weights of adapters, and whatever else is measured, in magnitude.
LARGEST_WEIGHT, LARGEST_VALUE = 1e6, 1e12
_LONGEST_WORD, _LONGEST_TEXT = 200, 2000


def check_integers(place: str, low: int, high: int, **values: int | None) -> None:
    """Make sure that named integers are in a range; None is passed over.

    Raises:
        ManifestInvalid: one is not.
    """
    for name, value in values.items():
        if value is not None and not low <= value <= high:
            raise ManifestInvalid(f"{name} of {place} is {value!r:.40}; expected {low} to {high}")


def check_floats(place: str, low: float, high: float, **values: float | None) -> None:
    """Make sure that named numbers are finite and in a range; None is passed over.

    Raises:
        ManifestInvalid: one is not.
    """
    for name, value in values.items():
        if value is not None and not low <= value <= high:  # NaN is in no range
            raise ManifestInvalid(f"{name} of {place} is {value!r:.40}; expected {low:g} to {high:g}")


def check_words(place: str, longest: int = _LONGEST_WORD, **values: str | None) -> None:
    """Make sure that named texts are short and printable, since they reach terminals; None is passed over.

    Raises:
        ManifestInvalid: one is not.
    """
    for name, value in values.items():
        if value is not None and not (len(value) <= longest and value.isprintable()):
            raise ManifestInvalid(
                f"{name} of {place} is {value!r:.60}, {len(value)} characters; expected up to {longest}, all printable"
            )


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Hash and size (bytes) of one file of the bundle."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ManifestInvalid(f"sha256 {self.sha256!r:.80} is not 64 hexadecimal digits")
        check_integers("a file", 0, MOST_COUNT, bytes=self.bytes)


@dataclass(frozen=True, slots=True)
class SlotGroup:
    """One linear module of every layer: A is (r, n_in), B is (r, n_out)."""

    name: str
    layers: int
    n_in: int
    n_out: int

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or len(self.name) > _LONGEST_WORD:
            raise ManifestInvalid(f"slot group {self.name!r:.80} is not a plain name")
        check_integers(f"slot group '{self.name}'", 1, MOST_LAYERS, layers=self.layers)
        check_integers(f"slot group '{self.name}'", 1, MOST_WIDTH, n_in=self.n_in, n_out=self.n_out)


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

    def __post_init__(self) -> None:
        check_floats(
            "distance",
            -LARGEST_VALUE,
            LARGEST_VALUE,
            kl=self.kl,
            top1=self.top1,
            nll=self.nll,
            nll_float=self.nll_float,
        )
        check_integers("distance", 0, MOST_COUNT, prompts=self.prompts, positions=self.positions)


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
            raise ManifestInvalid(f"fusing names no weight, or one without panels: {', '.join(bad[:4])!r:.200}")
        for name, shape in self.weights.items():
            check_words("fusing", weights=name)
            for size in shape:
                check_integers("a fused weight", 1, MOST_WIDTH, size=size)


@dataclass(frozen=True, slots=True)
class KVGraph:
    """A decoder whose keys and values are quantised.

    `kl` is the mean KL divergence (nats) of the next-token distribution from that with float caches, both on the float
    values of the base's file, over the positions of the base's distance.
    """

    graph: str
    kl: float

    def __post_init__(self) -> None:
        check_floats("a decoder with a quantised KV cache", -LARGEST_VALUE, LARGEST_VALUE, kl=self.kl)


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The decoder graph and its properties; only float bases have `fusing`.

    `cuda_graph` is the decoder with attention in float16, the only type that CUDA has attention kernels for.
    `architecture` is what transformers calls its kind, such as 'llama'. A sequence of more than `long_from` tokens is
    read with other rotary frequencies than a shorter one (LongRoPE); None where length does not matter. `kv_graphs` are
    the decoders with quantised caches, by `KVCacheType`.
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
    kv_graphs: dict[str, KVGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [group.name for group in self.slots]
        if not names or len(set(names)) != len(names):
            raise ManifestInvalid(f"the base has no adapter slots, or one twice: {', '.join(names):.200}")
        check_integers("the base", 1, MOST_TOKENS, context=self.context, long_from=self.long_from)
        check_integers("the base", 1, MOST_HEADS, kv_heads=self.kv_heads, head_size=self.head_size)
        check_integers("the base", 1, MOST_VOCABULARY, vocabulary=self.vocabulary)
        for token in self.end_tokens:
            check_integers("the base", 0, self.vocabulary - 1, end_tokens=token)
        check_words("the base", identity=self.identity, precision=self.precision, architecture=self.architecture)
        check_words("the base", _LONGEST_TEXT, source=self.source)
        unknown = next((name for name in self.kv_graphs if name not in ("int8", "int4")), None)
        if unknown is not None:
            raise ManifestInvalid(f"kv_graphs of the base name {unknown!r:.40}; expected int8 and int4")

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
        check_integers("the embedder", 1, MOST_DIMENSION, dimension=self.dimension)
        check_integers("the embedder", 8, MOST_TOKENS, max_length=self.max_length)
        check_integers("the embedder", 0, MOST_TOKENS, ends=self.ends)
        check_floats("the embedder", -1.01, 1.01, cosine=self.cosine)
        check_words("the embedder", identity=self.identity, precision=self.precision, pooling=self.pooling)
        check_words("the embedder", _LONGEST_TEXT, source=self.source)
        if self.ends and self.dimension % 3:
            raise ManifestInvalid(f"an embedder with ends has {self.dimension} dimensions; expected a multiple of 3")

    @property
    def space(self) -> str:
        """What vectors depend on: the encoder's weights, precision, pooling and ends, window and normalisation."""
        pooling = f"{self.pooling}+{self.ends}" if self.ends else self.pooling
        return f"{self.identity}/{self.precision}/{pooling}/{self.max_length}/{'unit' if self.normalize else 'free'}"


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """The USearch file: `vectors` cosine vectors of `dimension` in `dtype`, made by one embedder.

    `embedder` is the `space` of the `EmbedderSpec` whose vectors it holds.
    `whitening` is the file of the map from the embedder's vectors to those of the index, None where they are the same.
    """

    file: str
    vectors: int
    dimension: int
    embedder: str
    dtype: Literal["f16", "f32"] = "f16"
    texts: str | None = None
    whitening: str | None = None

    def __post_init__(self) -> None:
        check_integers("the index", 0, MOST_COUNT, vectors=self.vectors)
        check_integers("the index", 1, MOST_DIMENSION, dimension=self.dimension)


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
        check_integers("a task", 0, MOST_COUNT, first_key=self.first_key, examples=self.examples)
        check_integers("a task", 0, MOST_COUNT, last_key=self.first_key + self.examples)
        check_floats("a task", 0, 1.01, similarity=self.similarity)
        for weight in self.adapters.values():
            check_floats("a task's adapter", -LARGEST_WEIGHT, LARGEST_WEIGHT, weight=weight)


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
        if len(self.ci95) != 2 or not self.ci95[0] <= self.ci95[1]:
            raise ManifestInvalid(f"validation has the interval {self.ci95!r:.80}; expected two ends in order")
        check_integers("validation", 1, MOST_COUNT, examples=self.examples)
        for value in (self.base, self.accuracy, *self.ci95):
            check_floats("validation", -LARGEST_VALUE, LARGEST_VALUE, value=value)
        if self.verdict != verdict_of(*self.ci95):
            raise ManifestInvalid(f"validation says '{self.verdict}' of the interval {self.ci95}; validate it again")


def verdict_of(low: float, high: float) -> Verdict:
    """What an interval of the gain in accuracy says."""
    return "helps" if low > 0 else "hurts" if high < 0 else "unproven"


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

    def __post_init__(self) -> None:
        check_integers("an adapter", 1, MOST_RANK, rank=self.rank)
        check_floats("an adapter", 0, LARGEST_VALUE, error=self.error)
        check_words("an adapter", base=self.base)
