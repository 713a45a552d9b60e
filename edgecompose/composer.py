"""The whole way of a prompt: embed, retrieve, weigh, merge, generate; the one place that sees all of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.adapter import Adapter, load_adapter
from edgecompose.bundle.files import Bundle
from edgecompose.caching import LruCache
from edgecompose.engine.device import Device, DeviceRequest, choose_device, usable_cores
from edgecompose.engine.fusing import FusedWeights, require_fusing
from edgecompose.engine.memory import release_freed_memory
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import EdgeComposeError, GenerationError, MergeError, RetrievalError
from edgecompose.generation.decode import Finish
from edgecompose.generation.language_model import Blend, Encoded, LanguageModel
from edgecompose.generation.messages import Message, Prompt, conversation, query_text
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import composition_digest
from edgecompose.request import Answer, Composition, Request, Retrieval
from edgecompose.retrieval.embedder import Embedder, embedder_device
from edgecompose.retrieval.index import ExampleIndex
from edgecompose.retrieval.routing import adapter_weights, weigh
from edgecompose.retrieval.whitening import load_whitening
from edgecompose.settings import MergeSettings, override, resolve
from edgecompose.streaming import Generation, write_all
from edgecompose.timing import Clock

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
#: Blends that are kept for the next request that wants the same one.
CACHE_BYTES = 64 << 20
#: What was found for prompts is kept up to so many bytes, for the next request with the same prompt.
_RETRIEVAL_BYTES, _NEIGHBOUR_BYTES, _QUERY_BYTES = 16 << 20, 200, 1 << 20
#: Answers of a batch that are written at once, where a machine has cores for them.
_PARALLEL = 4


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What is to be answered, once its blend is there: `query` is what retrieval read, `limit` the most tokens."""

    query: str
    request: Request
    composition: Composition
    blend: Blend
    limit: int
    clock: Clock


class Composer:
    """An opened bundle on a device. Parts are loaded when first needed; `close` lets go of them.

    Safe between threads: answers of several threads are those of one. Blends are kept up to `cache_bytes`; folded bases
    up to `fused_cache_bytes`, by default the last one that was used.
    """

    def __init__(
        self, bundle: Bundle, device: Device, *, cache_bytes: int = CACHE_BYTES, fused_cache_bytes: int | None = None
    ) -> None:
        self.bundle = bundle
        self.device = device
        self._adapters: dict[str, Adapter] = {}
        self._queries: LruCache[Float] = LruCache(_QUERY_BYTES, lambda query: query.nbytes)
        self._blends: LruCache[MergedAdapter] = LruCache(cache_bytes, lambda merged: merged.bytes)
        self._retrievals: LruCache[Retrieval] = LruCache(
            _RETRIEVAL_BYTES, lambda found: _NEIGHBOUR_BYTES * len(found.neighbours)
        )
        self.model = LanguageModel(bundle, device, fused_cache_bytes=fused_cache_bytes)
        self._loading = threading.RLock()

    def __enter__(self) -> Composer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the sessions, the index and the adapters; they are loaded again if asked for."""
        with self._loading:
            self.model.close()
            self._adapters.clear()
            self._queries.clear()
            self._blends.clear()
            self._retrievals.clear()
            for part in ("embedder", "index", "merger"):
                self.__dict__.pop(part, None)

    def release_embedder(self) -> None:
        """Let go of the sentence encoder and the index, for programs that answer once: the base has their memory then.

        They are loaded again if asked for.
        """
        with self._loading:
            for part in ("embedder", "index"):
                self.__dict__.pop(part, None)
        release_freed_memory()

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
    def merger(self) -> Merger:
        """The merge engine."""
        return Merger(self.device)

    def warm_up(self) -> None:
        """Load everything that an answer needs."""
        with self._loading:
            _ = (self.embedder, self.index, self.model.tokenizer, self.model.decoder, self.merger)

    def adapter(self, name: str) -> Adapter:
        """One adapter of the bundle, read and checked once."""
        with self._loading:
            if name not in self._adapters:
                base = self.bundle.manifest.base
                path = self.bundle.adapter_file(name)
                self._adapters[name] = load_adapter(path, name, base.slots, base.identity)
            return self._adapters[name]

    def retrieve(
        self, prompt: Prompt, request: Request | None = None, *, spent: dict[str, float] | None = None
    ) -> Retrieval:
        """The tasks that a prompt resembles (embed, retrieve, weigh).

        Args:
            spent: is given the milliseconds of each stage.
        """
        clock, request = Clock(), request or Request()
        found = self._retrieve(query_text(conversation(prompt), request.route_by), request, clock)
        if spent is not None:
            spent.update(clock.spent)
        return found

    def embed(self, text: str) -> tuple[Float, int]:
        """The vector (dimension,) that the sentence encoder gives a text, and how many tokens it read of it.

        Raises:
            RetrievalError: the text is empty, or no Unicode.
        """
        with self._loading:
            embedder = self.embedder
        ids = embedder.tokens(text)
        return embedder.embed_tokens(ids), len(ids)

    def compose(self, prompt: Prompt, request: Request | None = None) -> Composition:
        """The blend for a prompt, on the device (embed, retrieve, weigh, merge)."""
        request = request or Request()
        return self._compose(query_text(conversation(prompt), request.route_by), request, Clock())

    def run(
        self, prompt: Prompt, request: Request | None = None, *, on_text: Callable[[str], None] = lambda text: None
    ) -> Answer:
        """Answer a prompt.

        Args:
            on_text: called with each piece of the answer as it becomes certain.

        Raises:
            EdgeComposeError: of the stage that failed.
        """
        with self.generate(prompt, request) as generation:
            for piece in generation:
                on_text(piece)
            return generation.answer

    def batch(
        self,
        prompts: Sequence[Prompt],
        requests: Request | Sequence[Request] | None = None,
        *,
        parallel: int | None = None,
    ) -> Generator[Answer | EdgeComposeError, None, None]:
        """Answer several prompts, each under its own blend; answers come in the prompts' order, as soon as they can.

        Each is a sequence of its own, so that it gets to the bit what it gets alone. An error takes the place of the
        answer that it prevented. Whoever stops iterating ends those that are being written.

        Args:
            requests: one for all, or one for each.
            parallel: answers that are written at once, by default one a core and four at most.

        Raises:
            GenerationError: there are not as many requests as prompts, or `parallel` is below 1.
        """
        asked = list(requests) if isinstance(requests, Sequence) else [requests or Request()] * len(prompts)
        if len(asked) != len(prompts):
            raise GenerationError(f"{len(prompts)} prompts and {len(asked)} requests were given; give one for each")
        if parallel is not None and parallel < 1:
            raise GenerationError(f"parallel is {parallel}; expected 1 or more")
        begin = [functools.partial(self.generate, *pair) for pair in zip(prompts, asked, strict=True)]
        return write_all(begin, parallel or min(usable_cores(), _PARALLEL))

    def score(self, prompt: Prompt, choices: Sequence[str], request: Request | None = None) -> dict[str, float]:
        """Mean log-likelihood (nats a token) of each of some answers to a prompt.

        Raises:
            GenerationError: no choice, an empty one, or one given twice.
            EdgeComposeError: of the stage that failed.
        """
        if not choices:
            raise GenerationError("no choice was given to score; give one or more")
        scores = self.run(prompt, dataclasses.replace(request or Request(), choices=tuple(choices))).choices
        return dict(scores or {})

    def generate(self, prompt: Prompt, request: Request | None = None) -> Generation:
        """Compose the blend for a prompt, read the prompt under it, and give an iterator over the answer.

        Args:
            prompt: text, or the messages of a conversation.

        Raises:
            EdgeComposeError: of the stage that failed.
        """
        request, messages = request or Request(), conversation(prompt)
        clock = Clock()
        if request.attachment == "fuse":
            require_fusing(self.bundle.manifest.base)
        with clock.stage("total"):
            query = query_text(messages, request.route_by)
            composition = self._compose(query, request, clock)
            with clock.stage("load"):
                tokenizer = self.model.tokenizer
            raw = self.sends_raw(request, composition.retrieval, messages)
            choices = _encode_choices(tokenizer, request.choices, raw=raw)
            limit = resolve(request.max_tokens, self.bundle.manifest.defaults.max_tokens)
            room = max(map(len, choices), default=limit)
            encode = functools.partial(self.model.encode, messages, room, overflow=request.overflow)
            encoded = encode(raw=raw)
            blend = self.model.attach(composition.merged, fuse=request.attachment == "fuse", clock=clock)
        in_template = None
        if raw and request.raw is None and tokenizer.has_chat_template:
            in_template = functools.partial(encode, raw=False)
        asked = _Asked(query, request, composition, blend, limit, clock)
        return Generation(composition, self._answer(asked, encoded, in_template, choices))

    def _answer(
        self,
        asked: _Asked,
        encoded: Encoded,
        in_template: Callable[[], Encoded] | None,
        choices: Sequence[Sequence[int]],
    ) -> Generator[str, None, Answer]:
        """Read the prompt, then the pieces of the answer one by one; returns all that there is to know of it.

        Args:
            in_template: gives the prompt in the chat template, for one that was sent raw and gets no answer.
            choices: those of the request, as token ids.
        """
        request, composition, clock = asked.request, asked.composition, asked.clock
        scores: dict[str, float] | None = None
        finish: Finish = "stop"
        if choices:
            with clock.stage("total"):
                found = self.model.choose(encoded, choices, asked.blend, clock)
            scores = dict(zip(request.choices, found, strict=True))
            text, count = max(scores, key=scores.__getitem__), sum(map(len, choices))
            yield text
        else:
            text, count, finish = yield from self._write(asked, encoded)
            if not count and in_template is not None:
                encoded = in_template()
                text, count, finish = yield from self._write(asked, encoded)
        return Answer(
            asked.query, text, composition.retrieval, composition.settings, composition.merged.digest,
            self.device, clock.spent, len(encoded.ids), count, scores, composition.merged.report,
            "fuse" if isinstance(asked.blend, FusedWeights) else "attach",
            None if request.weights is not None else embedder_device(self.bundle.manifest.embedder, self.device),
            finish, encoded.dropped, encoded.form,
        )  # fmt: skip

    def _write(self, asked: _Asked, encoded: Encoded) -> Generator[str, None, tuple[str, int, Finish]]:
        """The pieces of the answer; returns it whole, its number of tokens and why it ended."""
        request = asked.request
        pieces, written = [], self.model.write(
            encoded, asked.blend, asked.clock, max_tokens=asked.limit, sampling=request.sampling, stop=request.stop,
            reuse=request.prompt_cache,
        )  # fmt: skip
        try:
            while True:
                with asked.clock.stage("total"):
                    pieces.append(next(written))
                yield pieces[-1]
        except StopIteration as ended:
            return "".join(pieces), *ended.value
        finally:
            written.close()

    def _retrieve(self, prompt: str, request: Request, clock: Clock) -> Retrieval:
        if request.weights is not None:
            return Retrieval((), {}, {}, dict(request.weights))
        manifest = self.bundle.manifest
        settings = override(manifest.defaults.retrieval, request.retrieval, RetrievalError)
        key = _key(repr((prompt, settings, sorted(request.exclude))))
        known = self._retrievals.get(key)
        if known is not None:
            return known
        with clock.stage("load"), self._loading:
            embedder, index = self.embedder, self.index
        with clock.stage("embed"):
            query = self._embed(embedder, prompt)
        with clock.stage("retrieve"):
            neighbours = index.search(query, settings.neighbours, exclude=request.exclude)
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
        return frozenset(n for n, a in found if a.validation is not None and a.validation.verdict == "hurts")

    def sends_raw(self, request: Request, retrieval: Retrieval, messages: Sequence[Message] = ()) -> bool:
        """Whether a prompt is sent without the chat template, given what retrieval found for it.

        Args:
            messages: the conversation; one of several messages is sent in the chat template unless told otherwise.
        """
        if request.raw is not None:
            return request.raw
        if len(messages) > 1:
            return False
        alone = request.weights is None and not retrieval.nucleus
        trained_raw = self.bundle.manifest.defaults.prompt_form == "raw"
        return (trained_raw and not alone) or not self.model.tokenizer.has_chat_template

    def _compose(self, prompt: str, request: Request, clock: Clock) -> Composition:
        retrieval = self._retrieve(prompt, request, clock)
        settings = override(self.default_merge, request.merge, MergeError)
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
            with self._loading:
                merger = self.merger
            merged = merger.merge(adapters, list(weights.values()), settings, inner)
            self._blends.put(digest, merged)
        return merged

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
        return self.bundle.manifest.defaults.merge


def _encode_choices(tokenizer: Tokenizer, choices: Sequence[str], *, raw: bool) -> list[list[int]]:
    """Token ids of each choice, as it would follow the prompt."""
    if len(set(choices)) != len(choices):
        raise GenerationError("a choice is given twice; give each once")
    return [tokenizer.encode_continuation(f" {choice}" if raw else choice) for choice in choices]


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
