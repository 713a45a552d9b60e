"""Runs the base model with blends attached or fused."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from edgecompose.bundle.specs import BaseSpec, KVCacheType
from edgecompose.engine.decoding.batch import Batch
from edgecompose.engine.decoding.decoder_state import DecoderState, check_capacity
from edgecompose.engine.decoding.kv_cache import cache_dtype, cache_width
from edgecompose.engine.decoding.pass_queue import PassQueue
from edgecompose.engine.decoding.saved_prompt import CacheLayout
from edgecompose.engine.decoding.single import Blend, Single
from edgecompose.engine.device import Device, Session, open_session
from edgecompose.engine.fusing import FusedWeights, require_fusing, weight_axes
from edgecompose.engine.merged import MergedAdapter
from edgecompose.engine.slots import check_graph, slot_axes
from edgecompose.errors import GenerationError

#: What so many sequences ran with is kept for the next ones.
_IDLE = 2
#: Tokens that a pass of the graph reads at most, by device: what it computes on the way of a longer prompt takes more
#: memory, and, as it leaves a CPU's caches, more time; a GPU needs large passes.
_CHUNKS = {"cpu": 128, "cuda": 2048}


def decoder_graph(spec: BaseSpec, device: Device, *, fused: bool = False, kv_cache: KVCacheType = "float32") -> str:
    """Path, in the bundle, of the decoder that a device runs: on CUDA the one with attention in float16, if there is.

    Raises:
        GenerationError: `fused`, and the base cannot be fused; or it has no such KV cache there.
    """
    if kv_cache != "float32":
        return _kv_graph(spec, device, kv_cache)
    if fused:
        fusing = require_fusing(spec)
        graph, cuda_graph = fusing.decoder_graph, fusing.cuda_decoder_graph
    else:
        graph, cuda_graph = spec.graph, spec.cuda_graph
    return cuda_graph if device.kind == "cuda" and cuda_graph is not None else graph


def _kv_graph(spec: BaseSpec, device: Device, kv_cache: KVCacheType) -> str:
    """The decoder with a quantised KV cache."""
    if device.kind != "cpu":
        raise GenerationError(
            f"a KV cache in {kv_cache} runs on a CPU only, and the device is {device.kind}, which caches float16; "
            "leave out --kv-cache, or use --device cpu"
        )
    if kv_cache not in spec.kv_graphs:
        present = ", ".join(["float32", *spec.kv_graphs])
        raise GenerationError(
            f"the base has no decoder with a KV cache in {kv_cache}, it has: {present}; export the base again, which "
            "writes those that stay near float32"
        )
    return spec.kv_graphs[kv_cache].graph


class Decoder:
    """A session of the decoder graph. Sequences under different blends are written in one pass.

    Args:
        data: contents of files beside the graph that are not to be mapped.
    """

    def __init__(
        self, graph: Path, spec: BaseSpec, device: Device, *, data: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        self._session = open_session(graph, device, name="decoder", data=data)
        width = cache_width(spec, cache_dtype(self._session))
        inputs = {**_sequence_axes(spec, width), "slot_layout": {}, **slot_axes(spec.slots, axis=3)}
        check_graph(self._session, "decoder", inputs, _output_axes(spec, width))
        self._sequences = _Sequences(self._session, spec, device, Batch(self._session, spec, device))

    def layout(self, identity: str) -> CacheLayout:
        """What the caches of this decoder are like.

        Args:
            identity: as in `CacheLayout`; with that of the decoder's files.
        """
        spec, dtype = self._sequences.spec, cache_dtype(self._session)
        return CacheLayout(
            identity=identity,
            layers=spec.layers,
            heads=spec.kv_heads,
            width=cache_width(spec, dtype),
            dtype=dtype,
            vocabulary=spec.vocabulary,
            pass_tokens=_CHUNKS[self._sequences.device.kind],
        )

    def start(self, adapter: MergedAdapter, capacity: int, *, reserve: int | None = None) -> DecoderState:
        """Begin a sequence of at most `capacity` tokens under one blend.

        Args:
            reserve: tokens that caches have room for at once, by default all; for more they grow.

        Raises:
            PromptTooLong: `capacity` exceeds the context of the base.
        """
        return self._sequences.start(adapter, capacity, reserve)


class FusedDecoder:
    """A session of the decoder graph without slots, whose linear weights are fed. It holds no weights of its own.

    Its sequences are written one by one: each has weights of its own.
    """

    def __init__(self, graph: Path, spec: BaseSpec, device: Device) -> None:
        self._session = open_session(graph, device, name="fused decoder")
        width = cache_width(spec, cache_dtype(self._session))
        inputs = {**_sequence_axes(spec, width), **weight_axes(require_fusing(spec).weights)}
        check_graph(self._session, "fused decoder", inputs, _output_axes(spec, width))
        self._sequences = _Sequences(self._session, spec, device, None, most_idle=0)

    def start(self, weights: FusedWeights, capacity: int, *, reserve: int | None = None) -> DecoderState:
        """Begin a sequence of at most `capacity` tokens with weights that a blend was fused into.

        Args:
            reserve: tokens that caches have room for at once, by default all; for more they grow.

        Raises:
            PromptTooLong: `capacity` exceeds the context of the base.
        """
        return self._sequences.start(weights, capacity, reserve)


class _Sequences:
    """Begins the sequences of a session, and keeps what the last ones ran with."""

    def __init__(
        self, session: Session, spec: BaseSpec, device: Device, batch: Batch | None, *, most_idle: int = _IDLE
    ) -> None:
        self.spec, self.queue = spec, PassQueue(batch)
        self._session, self.device, self._most_idle = session, device, most_idle
        self._idle: list[Single] = []
        self._lock = threading.RLock()  # a sequence may be collected, and give back what it held, at any moment

    def start(self, blend: Blend, capacity: int, reserve: int | None) -> DecoderState:
        check_capacity(capacity, self.spec)
        state = DecoderState(self, blend, capacity=capacity, chunk=_CHUNKS[self.device.kind])
        weakref.finalize(state, self._give_all, state.holding).atexit = False
        state.hold().cache.grow(capacity if reserve is None else min(capacity, reserve), lengths=[0])
        return state

    def take(self, blend: Blend) -> Single:
        """What the last sequence under the same blend ran with, or another."""
        with self._lock:
            match = next((single for single in self._idle if single.blend.digest == blend.digest), None)
            if match is not None:
                self._idle = [single for single in self._idle if single is not match]
                return match
        return Single(self._session, self.spec, self.device, blend)

    def give(self, single: Single) -> None:
        with self._lock:
            self._idle = [single, *self._idle][: self._most_idle]

    def _give_all(self, singles: list[Single]) -> None:
        while singles:
            self.give(singles.pop())


def _sequence_axes(spec: BaseSpec, width: int) -> dict[str, dict[int, int]]:
    """What a decoder takes whatever its weights are: new tokens, lengths, caches."""
    names = ["input_ids", "seqlens_k", "query_seqlens", "total_sequence_length", "logits_at"]
    names += [] if spec.long_from is None else ["long_context"]
    return {**{name: {} for name in names}, **_cache_axes(spec, "past_key_values", width)}


def _output_axes(spec: BaseSpec, width: int) -> dict[str, dict[int, int]]:
    """What a decoder gives: logits, and the caches that it extended."""
    return {"logits": {1: spec.vocabulary}, **_cache_axes(spec, "present", width)}


def _cache_axes(spec: BaseSpec, prefix: str, width: int) -> dict[str, dict[int, int]]:
    names = (f"{prefix}.{layer}.{part}" for layer in range(spec.layers) for part in ("key", "value"))
    return {name: {1: spec.kv_heads, 3: width} for name in names}
