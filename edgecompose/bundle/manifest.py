"""What `manifest.json` says, as frozen values; knows nothing of the files that it names."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from edgecompose.bundle.records import value_from_json
from edgecompose.errors import ManifestInvalid, UnsupportedSchema

SCHEMA_VERSION = 4
MANIFEST_FILE = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
PromptForm = Literal["chat", "raw"]
Verdict = Literal["helps", "unproven", "harms"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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
class FoldingSpec:
    """The graphs that write a blend into a float base: one gives the folded weights, one decodes with them.

    `weights` are the folded ones, float32, in panels of columns: name -> (panels, n_in, columns of a panel).
    `cuda_decoder_graph` is the second with attention in float16, as `BaseSpec.cuda_graph`.
    """

    fold_graph: str
    decoder_graph: str
    weights: dict[str, tuple[int, ...]]
    cuda_decoder_graph: str | None = None

    def __post_init__(self) -> None:
        bad = [name for name, shape in self.weights.items() if len(shape) != 3 or min(shape) < 1]
        if bad or not self.weights:
            raise ManifestInvalid(f"folding names no weight, or one without panels: {', '.join(bad[:4])}")


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The decoder graph and what the decoding loop has to know of it; `folding` is there for float bases only.

    `cuda_graph` is the decoder with attention in float16, which is all that CUDA has kernels for. `architecture` is
    what transformers calls its kind, such as 'llama'. A sequence of more than `long_from` tokens is read with other
    rotary frequencies than a shorter one (LongRoPE); None where length does not matter.
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
    folding: FoldingSpec | None = None
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

    `ends` > 0 appends the means of the first and of the last `ends` tokens to the pooled vector, so that `dimension` is
    three times the encoder's width. `cosine` is the mean cosine between its vectors and those of its float32 form.
    """

    graph: str
    tokenizer: str
    identity: str
    precision: str
    dimension: int
    max_length: int
    pooling: Literal["mean", "cls"]
    normalize: bool
    ends: int = 0
    cosine: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        if self.dimension < 1 or self.max_length < 8 or self.ends < 0:
            raise ManifestInvalid("the embedder wants dimension >= 1, max_length >= 8 and ends >= 0")
        if self.ends and self.dimension % 3:
            raise ManifestInvalid(f"an embedder with ends has {self.dimension} dimensions; a multiple of 3 is wanted")


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
    """One task: the adapters that serve it with their weights, and the keys [first_key, first_key + examples).

    Usually that is the task's own adapter at weight 1; none at all leaves the task to the base.
    """

    adapters: dict[str, float]
    first_key: int
    examples: int

    def __post_init__(self) -> None:
        if self.first_key < 0 or self.examples < 0:
            raise ManifestInvalid("first_key and examples of a task must not be negative")
        if not all(math.isfinite(weight) for weight in self.adapters.values()):
            raise ManifestInvalid("a weight of a task's adapter is not finite")


@dataclass(frozen=True, slots=True)
class Admission:
    """What an adapter is worth on its task's validation examples, against the base alone.

    `verdict` is 'helps' or 'harms' where the 95 % interval `ci95` of the gain lies above or below 0, else 'unproven'.
    """

    verdict: Verdict
    examples: int
    base: float
    accuracy: float
    ci95: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.ci95) != 2 or self.examples < 1:
            raise ManifestInvalid("admission wants two ends of an interval and at least one example")


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter file: largest rank, bits per weight, relative quantisation error, provenance, what it is worth."""

    file: str
    rank: int
    bits: Literal[4, 8, 16]
    base: str
    error: float
    source: dict[str, Any] = field(default_factory=dict)
    admission: Admission | None = None


@dataclass(frozen=True, slots=True)
class Defaults:
    """Settings used where a request names none.

    `neighbours` is the paper's N, `temperature` its T (1 in the paper), `nucleus` its p; `size_correction`, `shortcut`
    and `fallback` are those of `weighting`; `prompt_form` is how a prompt is sent when adapters answer it;
    `method` and what follows it are the fields of `methods.MergeSettings`.
    """

    neighbours: int = 100
    temperature: float = 1.0
    nucleus: float = 0.9
    size_correction: float = 0.0
    shortcut: float = 1.0
    fallback: float = 0.0
    prompt_form: PromptForm = "chat"
    method: str = "product"
    density: float = 0.5
    majority_sign: Literal["total", "frequency"] = "total"
    rank: int | None = None
    energy: float | None = None
    seed: int = 0
    norm_guard: bool = False
    max_tokens: int = 128

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.max_tokens < 1:
            raise ManifestInvalid("neighbours and max_tokens must be at least 1")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ManifestInvalid(f"temperature is {self.temperature}; a positive number is wanted")
        if not (0 < self.nucleus <= 1 and 0 < self.density <= 1 and 0 < self.shortcut <= 1):
            raise ManifestInvalid("nucleus, shortcut and density must lie in (0, 1]")
        if not (0 <= self.size_correction <= 1 and 0 <= self.fallback <= 1):
            raise ManifestInvalid("size_correction and fallback must lie in [0, 1]")


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a bundle says of itself.

    `inner_products[a][b]`, a <= b, is the inner product of two adapters' updates over all modules and layers; what is
    missing is computed when it is needed.
    """

    name: str
    base: BaseSpec
    embedder: EmbedderSpec
    index: IndexSpec
    tasks: dict[str, TaskSpec]
    adapters: dict[str, AdapterSpec]
    defaults: Defaults
    files: dict[str, FileEntry]
    inner_products: dict[str, dict[str, float]] = field(default_factory=dict)
    created_by: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in (*self.tasks, *self.adapters):
            check_name(name)
        for name, task in self.tasks.items():
            for adapter in sorted(set(task.adapters) - set(self.adapters)):
                raise ManifestInvalid(f"task '{name}' names adapter '{adapter}', which is not in the manifest")
        for path in self.files:
            check_path(path)
        missing = sorted(set(self.named_files()) - set(self.files))
        if missing:
            raise ManifestInvalid(f"manifest names files without a hash: {', '.join(missing)}")
        if not all(math.isfinite(value) for row in self.inner_products.values() for value in row.values()):
            raise ManifestInvalid("an inner product of adapters is not finite; export the bundle again")
        self._check_keys()

    def named_files(self) -> list[str]:
        """Every file that some part of the manifest refers to."""
        optional = [self.base.chat_template, self.base.cuda_graph, self.index.texts, self.index.whitening]
        folding = self.base.folding
        if folding is not None:
            optional += [folding.fold_graph, folding.decoder_graph, folding.cuda_decoder_graph]
        return [
            self.base.graph, self.base.tokenizer, self.embedder.graph, self.embedder.tokenizer, self.index.file,
            *(a.file for a in self.adapters.values()), *(path for path in optional if path is not None),
        ]  # fmt: skip

    def _check_keys(self) -> None:
        spans = sorted((t.first_key, t.first_key + t.examples, name) for name, t in self.tasks.items())
        for (_, end, one), (start, _, other) in zip(spans, spans[1:], strict=False):
            if start < end:
                raise ManifestInvalid(f"tasks '{one}' and '{other}' share example keys")
        total = sum(t.examples for t in self.tasks.values())
        if total != self.index.vectors:
            raise ManifestInvalid(f"tasks count {total} examples, the index {self.index.vectors}")
        if self.index.whitening is None and self.index.dimension != self.embedder.dimension:
            raise ManifestInvalid(
                f"index is {self.index.dimension}-dimensional, the embedder {self.embedder.dimension}-dimensional"
            )


def check_name(name: str) -> str:
    """A task or adapter name, which is also a file name: letters, digits, '.', '_', '-', at most 100."""
    if not _NAME.fullmatch(name):
        raise ManifestInvalid(f"name {name!r} is not allowed; use letters, digits, '.', '_' and '-', at most 100")
    return name


def check_path(path: str) -> str:
    """A path inside the bundle: relative, with forward slashes, without '..'."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ":" in path or ".." in parts or "\0" in path:
        raise ManifestInvalid(f"path {path!r} leaves the bundle; a relative path inside of it is wanted")
    return path


def manifest_to_json(manifest: Manifest) -> str:
    """The manifest as the text of `manifest.json`: sorted keys, one field a line, final newline."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def manifest_from_json(text: str) -> Manifest:
    """The manifest that `text` describes.

    Raises:
        UnsupportedSchema: written by another major version.
        ManifestInvalid: not JSON, or a field missing, unknown, of the wrong type or out of range.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or an integer of thousands of digits
        raise ManifestInvalid(f"manifest.json is not JSON ({error}); export the bundle again") from error
    if not isinstance(found, dict):
        raise ManifestInvalid("manifest.json is not a JSON object; export the bundle again")
    version = found.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UnsupportedSchema(
            f"the bundle has schema version {version!r}, this edgecompose reads {SCHEMA_VERSION}; "
            "update edgecompose, or export the bundle again"
        )
    return value_from_json(Manifest, found, "manifest")
