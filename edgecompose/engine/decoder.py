"""Runs the base model with a blend attached or fused, one sequence at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoder_state import DecoderState, check_capacity
from edgecompose.engine.device import Device, Session, open_session
from edgecompose.engine.fusing import FusedWeights, require_fusing, weight_axes
from edgecompose.engine.kv_cache import KVCache, cache_dtype
from edgecompose.engine.merged import MergedAdapter
from edgecompose.engine.slots import bind_slots, check_graph, slot_axes

_IDLE_CACHES = 2
#: Tokens that a pass of the graph reads at most, by device: what it computes on the way of a longer prompt takes more
#: memory, and, as it leaves a CPU's caches, more time; a GPU needs large passes.
_CHUNKS = {"cpu": 128, "cuda": 2048}


def decoder_graph(spec: BaseSpec, device: Device, *, fused: bool = False) -> str:
    """Path, in the bundle, of the decoder that a device runs: on CUDA the one with attention in float16, if there is.

    Raises:
        GenerationError: `fused`, and the base cannot be fused.
    """
    if fused:
        fusing = require_fusing(spec)
        graph, cuda_graph = fusing.decoder_graph, fusing.cuda_decoder_graph
    else:
        graph, cuda_graph = spec.graph, spec.cuda_graph
    return cuda_graph if device.kind == "cuda" and cuda_graph is not None else graph


class Decoder:
    """A session of the decoder graph. It holds no state of any sequence.

    Args:
        data: contents of files beside the graph that are not to be mapped.
    """

    def __init__(
        self, graph: Path, spec: BaseSpec, device: Device, *, data: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        self.spec = spec
        self.device = device
        self._session = open_session(graph, device, name="decoder", data=data)
        inputs = {**_sequence_axes(spec), **slot_axes(spec.slots)}
        check_graph(self._session, "decoder", inputs, _output_axes(spec))
        cache_dtype(self._session)
        self._idle: list[KVCache] = []
        self._lock = threading.RLock()  # a sequence may be collected, and release its cache, at any moment

    def start(self, adapter: MergedAdapter, capacity: int, *, reserve: int | None = None) -> DecoderState:
        """Begin a sequence of at most `capacity` tokens under one blend.

        Args:
            reserve: tokens that caches have room for at once, by default all; for more they grow.

        Raises:
            PromptTooLong: `capacity` exceeds the context of the base.
        """
        check_capacity(capacity, self.spec)
        cache = self._idle_cache(adapter) or self._new_cache(adapter)
        cache.grow(capacity if reserve is None else min(capacity, reserve), length=0)
        state = _state(self._session, cache, self.spec, self.device, capacity)
        weakref.finalize(state, self._release, cache).atexit = False
        return state

    def _idle_cache(self, adapter: MergedAdapter) -> KVCache | None:
        """The cache of an earlier sequence under the same blend: binding hundreds of slots takes 2 ms."""
        with self._lock:
            match = next((cache for cache in self._idle if cache.blend.digest == adapter.digest), None)
            if match is not None:
                self._idle = [cache for cache in self._idle if cache is not match]
        return match

    def _new_cache(self, adapter: MergedAdapter) -> KVCache:
        cache = KVCache(self._session, self.spec, self.device, adapter)
        bind_slots(cache.binding, adapter, self.device)
        return cache

    def _release(self, cache: KVCache) -> None:
        with self._lock:
            self._idle = [cache, *self._idle][:_IDLE_CACHES]


class FusedDecoder:
    """A session of the decoder graph without slots, whose linear weights are fed. It holds no weights of its own."""

    def __init__(self, graph: Path, spec: BaseSpec, device: Device) -> None:
        self.spec = spec
        self.device = device
        self._session = open_session(graph, device, name="fused decoder")
        inputs = {**_sequence_axes(spec), **weight_axes(require_fusing(spec).weights)}
        check_graph(self._session, "fused decoder", inputs, _output_axes(spec))
        cache_dtype(self._session)

    def start(self, weights: FusedWeights, capacity: int, *, reserve: int | None = None) -> DecoderState:
        """Begin a sequence of at most `capacity` tokens with weights that a blend was fused into.

        Args:
            reserve: tokens that caches have room for at once, by default all; for more they grow.

        Raises:
            PromptTooLong: `capacity` exceeds the context of the base.
        """
        check_capacity(capacity, self.spec)
        cache = KVCache(self._session, self.spec, self.device, weights)
        weights.bind_inputs(cache.binding, self.device)
        cache.grow(capacity if reserve is None else min(capacity, reserve), length=0)
        return _state(self._session, cache, self.spec, self.device, capacity)


def _state(session: Session, cache: KVCache, spec: BaseSpec, device: Device, capacity: int) -> DecoderState:
    return DecoderState(session, cache, spec=spec, capacity=capacity, chunk=_CHUNKS[device.kind])


def _sequence_axes(spec: BaseSpec) -> dict[str, dict[int, int]]:
    """What a decoder takes whatever its weights are: new tokens, lengths, caches."""
    names = ["input_ids", "seqlens_k", "total_sequence_length", "logits_kept"]
    names += [] if spec.long_from is None else ["long_context"]
    return {**{name: {} for name in names}, **_cache_axes(spec, "past_key_values")}


def _output_axes(spec: BaseSpec) -> dict[str, dict[int, int]]:
    """What a decoder gives: logits, and the caches that it extended."""
    return {"logits": {2: spec.vocabulary}, **_cache_axes(spec, "present")}


def _cache_axes(spec: BaseSpec, prefix: str) -> dict[str, dict[int, int]]:
    names = (f"{prefix}.{layer}.{part}" for layer in range(spec.layers) for part in ("key", "value"))
    return {name: {1: spec.kv_heads, 3: spec.head_size} for name in names}
