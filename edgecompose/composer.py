"""The whole way of a prompt: embed, retrieve, weigh, merge, generate; the one place that sees all of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from edgecompose.adapter import Adapter, load_adapter
from edgecompose.blend import MergedAdapter
from edgecompose.buffers import LruCache
from edgecompose.bundle import Bundle
from edgecompose.decoder import Decoder, Decoding, Float, FoldedDecoder, decoder_graph
from edgecompose.device import Device, DeviceRequest, choose_device
from edgecompose.embedder import Embedder, embedder_device
from edgecompose.errors import GenerationError
from edgecompose.folding import FoldedWeights, Folding, folded_bytes, require_folding
from edgecompose.generation import generate, score_choices, stream_text
from edgecompose.manifest import Defaults
from edgecompose.merging import Merger
from edgecompose.methods import MergeSettings, composition_digest
from edgecompose.request import STAGES, WEIGH_NAMES, Answer, Composition, Request, Retrieval, given
from edgecompose.retrieval import ExampleIndex
from edgecompose.tokenization import Tokenizer
from edgecompose.weighting import WeighSettings, adapter_weights, weigh
from edgecompose.whitening import load_whitening

Double = npt.NDArray[np.float64]
#: Blends that are kept for the next request that wants the same one.
CACHE_BYTES = 256 << 20
#: What was found for prompts is kept up to so many bytes, for the next request with the same prompt.
_RETRIEVAL_BYTES, _NEIGHBOUR_BYTES, _QUERY_BYTES = 16 << 20, 200, 1 << 20


@dataclass(slots=True)
class _Clock:
    """Milliseconds spent in each stage."""

    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] += (time.perf_counter() - start) * 1e3


class Composer:
    """An opened bundle on a device. Parts are loaded when first needed; `close` lets go of them.

    Blends are kept up to `cache_bytes`; folded bases up to `folded_cache_bytes`, by default the last one that was used.
    """

    def __init__(
        self, bundle: Bundle, device: Device, *, cache_bytes: int = CACHE_BYTES, folded_cache_bytes: int | None = None
    ) -> None:
        self.bundle = bundle
        self.device = device
        self._adapters: dict[str, Adapter] = {}
        self._queries: LruCache[Float] = LruCache(_QUERY_BYTES, lambda query: query.nbytes)
        self._blends: LruCache[MergedAdapter] = LruCache(cache_bytes, lambda merged: merged.bytes)
        self._retrievals: LruCache[Retrieval] = LruCache(
            _RETRIEVAL_BYTES, lambda found: _NEIGHBOUR_BYTES * len(found.neighbours)
        )
        self._folded: LruCache[FoldedWeights] = LruCache(
            _size_of_folded(bundle) if folded_cache_bytes is None else folded_cache_bytes, lambda folded: folded.bytes
        )

    def __enter__(self) -> Composer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the sessions, the index and the adapters; they are loaded again if asked for."""
        self._adapters.clear()
        self._queries.clear()
        self._blends.clear()
        self._retrievals.clear()
        self._folded.clear()
        for part in ("embedder", "index", "decoder", "tokenizer", "merger", "folding", "folded_decoder"):
            self.__dict__.pop(part, None)

    @functools.cached_property
    def embedder(self) -> Embedder:
        """The sentence encoder."""
        spec = self.bundle.manifest.embedder
        return Embedder(self.bundle.path(spec.graph), self.bundle.path(spec.tokenizer), spec, self.device)

    @functools.cached_property
    def index(self) -> ExampleIndex:
        """The training examples."""
        manifest, spec = self.bundle.manifest, self.bundle.manifest.index
        whitening = None
        if spec.whitening is not None:
            whitening = load_whitening(self.bundle.path(spec.whitening), manifest.embedder.dimension, spec.dimension)
        return ExampleIndex(self.bundle.path(spec.file), spec, manifest.tasks, whitening)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer and chat template."""
        spec = self.bundle.manifest.base
        template = None if spec.chat_template is None else self.bundle.text(spec.chat_template)
        return Tokenizer(self.bundle.path(spec.tokenizer), chat_template=template)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The base model."""
        spec = self.bundle.manifest.base
        return Decoder(self._beside_decoder(decoder_graph(spec, self.device)), spec, self.device)

    @functools.cached_property
    def folding(self) -> Folding:
        """The fold graph of a float base."""
        spec = self.bundle.manifest.base
        return Folding(self._beside_decoder(require_folding(spec).fold_graph), spec, self.device)

    @functools.cached_property
    def folded_decoder(self) -> FoldedDecoder:
        """The decoder that reads folded weights."""
        spec = self.bundle.manifest.base
        return FoldedDecoder(self._beside_decoder(decoder_graph(spec, self.device, folded=True)), spec, self.device)

    @functools.cached_property
    def merger(self) -> Merger:
        """The merge engine."""
        return Merger(self.device)

    def warm_up(self) -> None:
        """Load everything that an answer needs."""
        _ = (self.embedder, self.index, self.tokenizer, self.decoder, self.merger)

    def adapter(self, name: str) -> Adapter:
        """One adapter of the bundle, read and checked once."""
        if name not in self._adapters:
            base = self.bundle.manifest.base
            path = self.bundle.adapter_file(name)
            self._adapters[name] = load_adapter(path, name, base.slots, base.identity)
        return self._adapters[name]

    def retrieve(
        self, prompt: str, request: Request | None = None, *, spent: dict[str, float] | None = None
    ) -> Retrieval:
        """The tasks that a prompt resembles (embed, retrieve, weigh).

        Args:
            spent: is given the milliseconds of each stage.
        """
        clock = _Clock()
        found = self._retrieve(prompt, request or Request(), clock)
        if spent is not None:
            spent.update(clock.spent)
        return found

    def compose(self, prompt: str, request: Request | None = None) -> Composition:
        """The blend for a prompt, on the device (embed, retrieve, weigh, merge)."""
        return self._compose(prompt, request or Request(), _Clock())

    def run(
        self, prompt: str, request: Request | None = None, *, on_text: Callable[[str], None] = lambda text: None
    ) -> Answer:
        """Answer a prompt.

        Args:
            on_text: called with each piece of the answer as it becomes certain.

        Raises:
            EdgeComposeError: of the stage that failed.
        """
        request = request or Request()
        clock = _Clock()
        if request.attachment == "fold":
            require_folding(self.bundle.manifest.base)
        with clock.stage("total"):
            composition = self._compose(prompt, request, clock)
            raw = self.sends_raw(request, composition.retrieval)
            ids = self._encode(prompt, raw=raw)
            blend: MergedAdapter | FoldedWeights = composition.merged
            if request.attachment == "fold" and composition.merged.modules:
                blend = self._fold(composition.merged, clock)
            if request.choices:
                text, count, scores = self._choose(ids, blend, request, clock, raw=raw)
                on_text(text)
            else:
                text, count = self._generate(ids, blend, request, clock, on_text)
                scores = None
        return Answer(
            prompt, text, composition.retrieval, composition.settings, composition.merged.digest,
            self.device, clock.spent, len(ids), count, scores, composition.merged.report,
            "fold" if isinstance(blend, FoldedWeights) else "attach",
            None if request.weights is not None else embedder_device(self.bundle.manifest.embedder, self.device),
        )  # fmt: skip

    def _retrieve(self, prompt: str, request: Request, clock: _Clock) -> Retrieval:
        if request.weights is not None:
            return Retrieval((), {}, {}, dict(request.weights))
        manifest = self.bundle.manifest
        count = given(request.neighbours, manifest.defaults.neighbours)
        settings = WeighSettings(
            **{name: given(getattr(request, name), getattr(manifest.defaults, name)) for name in WEIGH_NAMES}
        )
        key = _key(repr((prompt, count, settings, sorted(request.exclude))))
        known = self._retrievals.get(key)
        if known is not None:
            return known
        with clock.stage("load"):
            embedder, index = self.embedder, self.index
        with clock.stage("embed"):
            query = self._embed(embedder, prompt)
        with clock.stage("retrieve"):
            neighbours = index.search(query, count, exclude=request.exclude)
        with clock.stage("weigh"):
            sizes = {name: task.examples for name, task in manifest.tasks.items()}
            distribution, kept = weigh(neighbours, settings, sizes)
            weights = self.adapters_for(kept, request.exclude)
        found = Retrieval(tuple(neighbours), distribution, kept, weights)
        self._retrievals.put(key, found)
        return found

    def adapters_for(self, tasks: Mapping[str, float], exclude: Collection[str] = ()) -> dict[str, float]:
        """Weights of adapters from weights of tasks, those that do harm passed over.

        Args:
            exclude: tasks left out; each takes the adapter of its name along, whatever else that serves.
        """
        serving = {name: task.adapters for name, task in self.bundle.manifest.tasks.items()}
        return adapter_weights(tasks, serving, barred=self._harmful.union(exclude))

    def _embed(self, embedder: Embedder, prompt: str) -> Float:
        """The prompt's vector, from the cache where another request weighed the same prompt in another way."""
        key = _key(prompt)
        query = self._queries.get(key)
        if query is None:
            query = embedder.embed(prompt)
            self._queries.put(key, query)
        return query

    @functools.cached_property
    def _harmful(self) -> frozenset[str]:
        """Adapters that their validation examples speak against."""
        found = self.bundle.manifest.adapters.items()
        return frozenset(n for n, a in found if a.admission is not None and a.admission.verdict == "harms")

    def sends_raw(self, request: Request, retrieval: Retrieval) -> bool:
        """Whether a prompt is sent without the chat template, given what retrieval found for it."""
        if request.raw is not None:
            return request.raw
        alone = request.weights is None and not retrieval.nucleus
        return self.bundle.manifest.defaults.prompt_form == "raw" and not alone

    def _compose(self, prompt: str, request: Request, clock: _Clock) -> Composition:
        retrieval = self._retrieve(prompt, request, clock)
        settings = request.merge or self.default_merge
        with clock.stage("load"):
            adapters = [self.adapter(name) for name in retrieval.weights]
        with clock.stage("merge"):
            merged = self._merge(adapters, retrieval.weights, settings)
        return Composition(retrieval, settings, merged)

    def _merge(
        self, adapters: Sequence[Adapter], weights: Mapping[str, float], settings: MergeSettings
    ) -> MergedAdapter:
        """A blend, from the cache where it is there."""
        digest = composition_digest({a.name: a.digest for a in adapters}, weights, settings)
        merged = self._blends.get(digest)
        if merged is None:
            inner = self.inner_products(list(weights)) if settings.norm_guard else None
            merged = self.merger.merge(adapters, list(weights.values()), settings, inner)
            self._blends.put(digest, merged)
        return merged

    def _fold(self, merged: MergedAdapter, clock: _Clock) -> FoldedWeights:
        """The base with a blend in its weights, from the cache where it is there."""
        with clock.stage("load"):
            folding = self.folding
        with clock.stage("fold"):
            folded = self._folded.get(merged.digest)
            if folded is None:
                # what goes is let go of first, so that its memory is used again
                self._folded.make_room(_size_of_folded(self.bundle))
                folded = folding.fold(merged)
                self._folded.put(merged.digest, folded)
        return folded

    def _beside_decoder(self, graph: str) -> Path:
        """Checked path of a graph that reads the decoder's data file, which is checked as well."""
        data = f"{self.bundle.manifest.base.graph}.data"
        if data in self.bundle.manifest.files:
            self.bundle.path(data)
        return self.bundle.path(graph)

    def inner_products(self, names: Sequence[str]) -> Double:
        """Inner products (K, K) of adapters' updates, as the manifest has them, or else computed from the factors."""
        known = self.bundle.manifest.inner_products
        pairs = [(min(one, other), max(one, other)) for one in names for other in names]
        if all(other in known.get(one, {}) for one, other in pairs):
            return np.array([known[one][other] for one, other in pairs]).reshape(len(names), len(names))
        return self.merger.inner_products([self.adapter(name) for name in names])

    @property
    def default_merge(self) -> MergeSettings:
        """The bundle's method and parameters."""
        return merge_settings(self.bundle.manifest.defaults)

    def _encode(self, prompt: str, *, raw: bool) -> list[int]:
        if not raw and self.tokenizer.has_chat_template:
            prompt = self.tokenizer.chat([{"role": "user", "content": prompt}])
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise GenerationError("the prompt is empty; give some text")
        return ids

    def _read_prompt(
        self, ids: Sequence[int], blend: MergedAdapter | FoldedWeights, room: int, clock: _Clock
    ) -> tuple[Decoding, Float]:
        with clock.stage("load"):
            start: Callable[[int], Decoding]
            if isinstance(blend, FoldedWeights):
                start = functools.partial(self.folded_decoder.start, blend)
            else:
                start = functools.partial(self.decoder.start, blend)
        with clock.stage("prefill"):
            decoding = start(len(ids) + room)
            return decoding, decoding.forward(ids)[0]

    def _generate(
        self,
        ids: list[int],
        blend: MergedAdapter | FoldedWeights,
        request: Request,
        clock: _Clock,
        on_text: Callable[[str], None],
    ) -> tuple[str, int]:
        limit = given(request.max_tokens, self.bundle.manifest.defaults.max_tokens)
        decoding, logits = self._read_prompt(ids, blend, limit, clock)
        end = self.bundle.manifest.base.end_tokens
        tokens = generate(decoding, logits, max_tokens=limit, end_tokens=end, sampling=request.sampling)
        pieces, count = [], 0
        with clock.stage("decode"):
            for token, piece in stream_text(tokens, self.tokenizer):
                count += token >= 0
                pieces.append(piece)
                on_text(piece)
        return "".join(pieces), count

    def _choose(
        self, ids: list[int], blend: MergedAdapter | FoldedWeights, request: Request, clock: _Clock, *, raw: bool
    ) -> tuple[str, int, dict[str, float]]:
        if len(set(request.choices)) != len(request.choices):
            raise GenerationError("a choice is given twice; give each once")
        raw = raw or not self.tokenizer.has_chat_template
        choices = [self.tokenizer.encode(f" {choice}" if raw else choice) for choice in request.choices]
        decoding, logits = self._read_prompt(ids, blend, max(map(len, choices)), clock)
        with clock.stage("decode"):
            scores = score_choices(decoding, logits, choices)
        ranked = dict(zip(request.choices, scores, strict=True))
        return max(ranked, key=ranked.__getitem__), sum(map(len, choices)), ranked


def merge_settings(defaults: Defaults) -> MergeSettings:
    """How a bundle merges where a request names nothing.

    Raises:
        MergeError: an unknown method, or a parameter out of range.
    """
    return MergeSettings(**{item.name: getattr(defaults, item.name) for item in dataclasses.fields(MergeSettings)})


def _size_of_folded(bundle: Bundle) -> int:
    folding = bundle.manifest.base.folding
    return 0 if folding is None else folded_bytes(folding)


def _key(text: str) -> str:
    """What a cache knows a text by: no prompt is kept, however long."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def open_bundle(path: str | Path, *, device: DeviceRequest = "auto") -> Composer:
    """Open a bundle for answering prompts; use it in a `with` statement.

    Args:
        path: the bundle's directory.
        device: 'auto', 'cpu' or 'cuda'.

    Raises:
        BundleError: the bundle cannot be used.
        DeviceError: the device cannot be used.
    """
    return Composer(Bundle(Path(path)), choose_device(device))
