"""Turns a prompt into weights of adapters: embed, search, route."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.files import Bundle
from edgecompose.caching import Lazy, LazyParts, LruCache
from edgecompose.engine.device import Device
from edgecompose.engine.graph_file import graph_path
from edgecompose.engine.memory import release_freed_memory
from edgecompose.errors import FileDamaged
from edgecompose.retrieval.answers import ExampleAnswers
from edgecompose.retrieval.embedder import Embedder
from edgecompose.retrieval.index import EXACT_BELOW, ExampleIndex, Neighbour
from edgecompose.retrieval.resemblance import resemblance
from edgecompose.retrieval.routing import adapter_weights, weigh
from edgecompose.retrieval.whitening import load_whitening
from edgecompose.settings import RetrievalSettings
from edgecompose.timing import Timings

Float = npt.NDArray[np.float32]
#: Results of earlier prompts are kept up to so many bytes.
_RETRIEVAL_BYTES, _NEIGHBOUR_BYTES, _QUERY_BYTES = 16 << 20, 200, 1 << 20


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Neighbours, the distribution over tasks before the nucleus cut, the tasks that it kept, and adapter weights."""

    neighbours: tuple[Neighbour, ...]
    distribution: Mapping[str, float]
    nucleus: Mapping[str, float]
    weights: Mapping[str, float]
    resemblance: float | None = None


class Retriever(LazyParts):
    """The sentence encoder and the index of a bundle, loaded when first needed. Safe between threads.

    Results of earlier prompts are kept; no prompt is.
    """

    def __init__(self, bundle: Bundle, device: Device) -> None:
        super().__init__()
        self._bundle, self._device = bundle, device
        self._manifest = bundle.manifest
        self._queries: LruCache[Float] = LruCache(_QUERY_BYTES, lambda query: query.nbytes)
        self._retrievals: LruCache[Retrieval] = LruCache(
            _RETRIEVAL_BYTES, lambda retrieval: _NEIGHBOUR_BYTES * len(retrieval.neighbours)
        )

    @Lazy
    def embedder(self) -> Embedder:
        """The sentence encoder."""
        spec = self._manifest.embedder
        graph, tokenizer = graph_path(self._bundle, spec.graph), self._bundle.path(spec.tokenizer)
        return Embedder(graph, tokenizer, spec, self._device, data=self._bundle.graph_data(spec.graph))

    @Lazy
    def index(self) -> ExampleIndex:
        """The training examples."""
        spec, whitening = self._manifest.index, None
        if spec.whitening is not None:
            path = self._bundle.path(spec.whitening)
            whitening = load_whitening(path, self._manifest.embedder.dimension, spec.dimension)
        in_memory = spec.vectors <= EXACT_BELOW  # all are read by every search
        source = self._bundle.content(spec.file) if in_memory else self._bundle.path(spec.file)
        return ExampleIndex(source, spec, self._manifest.tasks, whitening)

    @Lazy
    def answers(self) -> ExampleAnswers | None:
        """The answers of the training examples, None where the bundle keeps none, or another file has their place."""
        texts = self._manifest.index.texts
        try:
            return None if texts is None else ExampleAnswers(self._bundle.path(texts), self._manifest.tasks)
        except FileDamaged:  # they only make answers faster
            return None

    def release(self) -> None:
        """Drop encoder and index, and give their memory back; they are loaded again when needed."""
        self.drop()
        release_freed_memory()

    def close(self) -> None:
        """Drop everything, earlier results too."""
        self.release()
        self._queries.clear()
        self._retrievals.clear()

    def load(self) -> None:
        """Load encoder and index."""
        _ = (self.embedder, self.index)

    def embed(self, text: str) -> tuple[Float, int]:
        """The vector (dimension,) of a text, and how many tokens the encoder read of it.

        Raises:
            RetrievalError: the text is empty, or no Unicode.
        """
        embedder = self.embedder
        ids = embedder.tokens(text)
        return embedder.embed_tokens(ids), len(ids)

    def retrieve(
        self, text: str, settings: RetrievalSettings, exclude: Collection[str] = (), timings: Timings | None = None
    ) -> Retrieval:
        """The tasks that a text resembles, and the weights of their adapters.

        Args:
            exclude: tasks left out.
            timings: gets the time of each stage; a text seen before takes none.

        Raises:
            RetrievalError: the text cannot be embedded, or nothing is left to search.
            UnknownAdapter: `exclude` names a task that the bundle does not have.
        """
        timings = timings or Timings()
        key = _key(repr((text, settings, sorted(exclude))))
        known = self._retrievals.get(key)
        if known is not None:
            return known
        with timings.stage("load"):
            self.load()
        with timings.stage("embed"):
            query = self._query(text)
        with timings.stage("retrieve"):
            neighbours = self.index.search(query, settings.neighbours, exclude=exclude)
        with timings.stage("weigh"):
            sizes = {name: task.examples for name, task in self._manifest.tasks.items()}
            distribution, nucleus = weigh(neighbours, settings, sizes)
            alike = resemblance(neighbours, self._typical)
            if alike is not None and alike < settings.min_resemblance:
                nucleus = {}
            weights = self.adapters_for(nucleus, exclude)
        retrieval = Retrieval(tuple(neighbours), distribution, nucleus, weights, alike)
        self._retrievals.put(key, retrieval)
        return retrieval

    def answers_of(self, retrieval: Retrieval) -> Iterator[str]:
        """The kept answers of the neighbours whose tasks were chosen, the nearest first."""
        keys = [neighbour.key for neighbour in retrieval.neighbours if neighbour.task in retrieval.nucleus]
        if keys and self.answers is not None:
            yield from self.answers.read(keys)

    def adapters_for(self, tasks: Mapping[str, float], exclude: Collection[str] = ()) -> dict[str, float]:
        """Weights of adapters from weights of tasks, without those that hurt.

        Args:
            exclude: tasks left out; each takes the adapter of its name along, whatever else is mapped to it.
        """
        mapping = {name: task.adapters for name, task in self._manifest.tasks.items()}
        return adapter_weights(tasks, mapping, excluded=self._hurting.union(exclude))

    def _query(self, text: str) -> Float:
        """The vector of a text, kept for other settings."""
        key = _key(text)
        query = self._queries.get(key)
        if query is None:
            query, _ = self.embed(text)
            self._queries.put(key, query)
        return query

    @functools.cached_property
    def _typical(self) -> Mapping[str, float]:
        """The typical similarity of each task that has one."""
        return {name: task.similarity for name, task in self._manifest.tasks.items() if task.similarity}

    @functools.cached_property
    def _hurting(self) -> frozenset[str]:
        """Adapters that hurt on their validation examples."""
        adapters = self._manifest.adapters.items()
        return frozenset(n for n, a in adapters if a.validation is not None and a.validation.verdict == "hurts")


def _key(text: str) -> str:
    """The key of a text in a cache: its hash, so that no prompt is stored."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
