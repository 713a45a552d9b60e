"""The base model with a blend attached or folded in, one sequence at a time; knows nothing of text or sampling."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.device import Device, IOBinding, OrtValue, Session, host, open_session
from edgecompose.engine.fusing import FusedWeights, require_fusing, weight_axes
from edgecompose.engine.merged import MergedAdapter
from edgecompose.engine.slots import bind_slots, check_graph, slot_axes
from edgecompose.errors import BundleError, GenerationError, PromptTooLong

Float = npt.NDArray[np.float32]
#: Caches have room for a multiple of so many tokens, so that the next sequence under the same blend can have them.
_CAPACITY_STEP = 64
_IDLE_SEATS = 2
#: Tokens that a pass of the graph reads at most, by device: what it computes on the way of a longer prompt takes more
#: memory, and, as it leaves a CPU's caches, more time; a GPU wants large passes.
_PIECES = {"cpu": 128, "cuda": 2048}
_HOST = host("inputs and logits live on the host")
#: Element types that a key-value cache may have, as ONNX Runtime calls them.
_CACHE_TYPES: dict[str, type[np.float16 | np.float32]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def decoder_graph(spec: BaseSpec, device: Device, *, folded: bool = False) -> str:
    """Path, in the bundle, of the decoder that a device runs: on CUDA the one with attention in float16, if there is.

    Raises:
        GenerationError: `folded`, and the base cannot be folded.
    """
    if folded:
        folding = require_fusing(spec)
        graph, cuda_graph = folding.decoder_graph, folding.cuda_decoder_graph
    else:
        graph, cuda_graph = spec.graph, spec.cuda_graph
    return cuda_graph if device.kind == "cuda" and cuda_graph is not None else graph


class Decoder:
    """A session of the decoder graph. It holds no state of any sequence."""

    def __init__(self, graph: Path, spec: BaseSpec, device: Device) -> None:
        self.spec = spec
        self.device = device
        self._session = open_session(graph, device, name="decoder")
        inputs = {**_sequence_axes(spec), **slot_axes(spec.slots)}
        check_graph(self._session, "decoder", inputs, {"logits": {2: spec.vocabulary}})
        _cache_dtype(self._session)
        self._idle: list[_Seat] = []
        self._lock = threading.RLock()  # a sequence may be collected, and vacate its seat, at any moment

    def start(self, adapter: MergedAdapter, capacity: int, *, reserve: int | None = None) -> Decoding:
        """Begin a sequence of at most `capacity` tokens under one blend.

        Args:
            reserve: tokens that caches have room for at once, by default all; for more they grow.

        Raises:
            PromptTooLong: `capacity` exceeds the context of the base.
        """
        check_capacity(capacity, self.spec)
        seat = self._seat(adapter, capacity if reserve is None else min(capacity, reserve))
        decoding = Decoding(self._session, self.spec, seat, capacity)
        weakref.finalize(decoding, self._vacate, seat).atexit = False
        return decoding

    def _seat(self, adapter: MergedAdapter, capacity: int) -> _Seat:
        """Where an earlier sequence under the same blend sat, or a new seat: binding hundreds of slots takes 2 ms."""
        with self._lock:
            found = next((s for s in self._idle if s.blend.digest == adapter.digest), None)
            if found is not None:
                self._idle = [s for s in self._idle if s is not found]
        if found is None:
            found = _Seat(self._session, self.spec, self.device, adapter)
            bind_slots(found.binding, adapter, self.device)
        found.grow(capacity, kept=0)
        return found

    def _vacate(self, seat: _Seat) -> None:
        with self._lock:
            self._idle = [seat, *self._idle][:_IDLE_SEATS]


class FusedDecoder:
    """A session of the decoder graph without slots, whose linear weights are fed. It holds no weights of its own."""

    def __init__(self, graph: Path, spec: BaseSpec, device: Device) -> None:
        self.spec = spec
        self.device = device
        self._session = open_session(graph, device, name="folded decoder")
        inputs = {**_sequence_axes(spec), **weight_axes(require_fusing(spec).weights)}
        check_graph(self._session, "folded decoder", inputs, {"logits": {2: spec.vocabulary}})
        _cache_dtype(self._session)

    def start(self, weights: FusedWeights, capacity: int, *, reserve: int | None = None) -> Decoding:
        """Begin a sequence of at most `capacity` tokens with weights that a blend was folded into.

        Args:
            reserve: tokens that caches have room for at once, by default all; for more they grow.

        Raises:
            PromptTooLong: `capacity` exceeds the context of the base.
        """
        check_capacity(capacity, self.spec)
        seat = _Seat(self._session, self.spec, self.device, weights)
        weights.bind_inputs(seat.binding, self.device)
        seat.grow(capacity if reserve is None else min(capacity, reserve), kept=0)
        return Decoding(self._session, self.spec, seat, capacity)


class _Seat:
    """A binding of a decoder's session, the caches bound to it, and the blend whose memory it reads."""

    def __init__(self, session: Session, spec: BaseSpec, device: Device, blend: MergedAdapter | FusedWeights) -> None:
        self.binding: IOBinding = session.io_binding()
        self.blend = blend
        self.capacity = 0
        self.piece = _PIECES[device.kind]
        self._spec = spec
        self._dtype = _cache_dtype(session)
        # Attention in float32 has no CUDA kernel, so ONNX Runtime runs it on the CPU whatever the device. A cache on
        # the device would then be copied to the CPU when it is bound and never again: the prompt would be right and
        # every later step wrong. On the host it is right, and slow: queries, keys and values are copied at every step.
        self._place = _HOST if self._dtype is np.float32 else device
        self._caches: dict[str, OrtValue] = {}

    def grow(self, capacity: int, *, kept: int) -> None:
        """Make room for `capacity` tokens at least, of which the first `kept` stay in the caches."""
        if capacity <= self.capacity:
            return
        tokens = max(capacity, 2 * self.capacity)
        self.capacity = min(-(-tokens // _CAPACITY_STEP) * _CAPACITY_STEP, self._spec.context)
        for layer in range(self._spec.layers):
            for part in ("key", "value"):
                name = f"{layer}.{part}"
                buffer = self._grown(self._caches.get(name), kept)
                self.binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
                self.binding.bind_ortvalue_output(f"present.{name}", buffer)
                self._caches[name] = buffer

    def _grown(self, old: OrtValue, kept: int) -> OrtValue:
        """One cache of the present capacity with the first `kept` tokens of the old one."""
        shape = (1, self._spec.kv_heads, self.capacity, self._spec.head_size)
        if not kept:
            return self._place.empty(shape, self._dtype)
        values = np.empty(shape, self._dtype)
        values[:, :, :kept] = old.numpy()[:, :, :kept]
        return self._place.place(values)


class Decoding:
    """One sequence: its tokens, their key-value cache, and the blend that every entry of it was made with.

    The cache is one buffer of each layer that attention reads and extends in place; it is copied only when it grows, to
    twice its length. Its element type, float32 or float16, is the graph's.
    """

    def __init__(self, session: Session, spec: BaseSpec, seat: _Seat, capacity: int) -> None:
        self.seat = seat
        self.composition = seat.blend.digest
        self.tokens: list[int] = []
        self._session, self._spec, self._capacity = session, spec, capacity
        self._binding = seat.binding
        self._past = _HOST.empty((1,), np.int32)
        self._total = _HOST.empty((), np.int32)
        self._shape = (0, 0)
        self._ids: OrtValue = None
        self._logits: OrtValue = None
        self._long = False
        self._bind_frequencies()

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def forward(self, ids: Sequence[int], *, kept: int = 1) -> Float:
        """Append tokens and return the logits of the last `kept` of them.

        Args:
            ids: at least one token id.
            kept: how many positions, in 1 .. len(ids).

        Returns:
            (kept, vocabulary) float32; overwritten by the next call.

        Raises:
            GenerationError: an id outside the vocabulary, or more tokens than the sequence may have.
        """
        count = len(ids)
        if not 1 <= kept <= count:
            raise GenerationError(f"{kept} of {count} logits were asked for")
        if self.length + count > self._capacity:
            raise GenerationError(f"the sequence would have {self.length + count} of {self._capacity} tokens")
        outside = next((i for i in ids if not 0 <= i < self._spec.vocabulary), None)
        if outside is not None:
            raise GenerationError(f"token id {outside} is outside the vocabulary of {self._spec.vocabulary}")
        if self._turns_long(self.length + count):
            ids = [*self.tokens, *ids]
            self.rewind(0)
            count = len(ids)
        self.seat.grow(self.length + count, kept=self.length)
        rows = []
        for start in range(0, count, self.seat.piece):
            piece = ids[start : start + self.seat.piece]
            later = count - start - len(piece)
            rows.append(self._pass(piece, min(len(piece), max(1, kept - later))))
            if later:
                rows[-1] = rows[-1].copy()
        return rows[0] if len(rows) == 1 else np.concatenate(rows)[-kept:]

    def _turns_long(self, length: int) -> bool:
        """Take the frequencies of a sequence of `length` tokens; tell whether cached keys were made with others.

        As transformers has it: a sequence is read with one set of frequencies, and again when it passes the limit.
        """
        limit = self._spec.long_from
        if limit is None or (length > limit) == self._long:
            return False
        self._long = length > limit
        self._bind_frequencies()
        return self.length > 0

    def _bind_frequencies(self) -> None:
        if self._spec.long_from is not None:
            self._binding.bind_ortvalue_input("long_context", _HOST.place(np.array([self._long], np.int64)))

    def _pass(self, ids: Sequence[int], kept: int) -> Float:
        """Run the graph once.

        The sequence has the tokens only when their keys and values are in the cache: Ctrl-C may end the run.
        """
        length = self.length + len(ids)
        self._resize(len(ids), kept)
        self._ids.update_inplace(np.array([ids], np.int64))
        self._past.update_inplace(np.array([length - 1], np.int32))
        self._total.update_inplace(np.array(length, np.int32))
        self._bind_step()
        self._session.run_with_iobinding(self._binding)
        self.tokens += ids
        return np.asarray(self._logits.numpy()[0], np.float32)

    def rewind(self, length: int) -> None:
        """Forget all tokens after the first `length`; their cache entries are overwritten."""
        if not 0 <= length <= self.length:
            raise GenerationError(f"a sequence of {self.length} tokens cannot be rewound to {length}")
        del self.tokens[length:]

    def extend(self, capacity: int) -> None:
        """Allow the sequence up to `capacity` tokens.

        Raises:
            PromptTooLong: that exceeds the context of the base.
        """
        check_capacity(capacity, self._spec)
        self._capacity = capacity

    def _resize(self, count: int, kept: int) -> None:
        """Make ids and logits of another shape (a bound output of a stale shape is an error)."""
        if (count, kept) == self._shape:
            return
        self._ids = _HOST.empty((1, count), np.int64)
        self._logits = _HOST.empty((1, kept, self._spec.vocabulary))
        self._binding.bind_ortvalue_input("logits_kept", _HOST.place(np.array([kept], np.int64)))
        self._binding.bind_ortvalue_output("logits", self._logits)
        self._shape = (count, kept)

    def _bind_step(self) -> None:
        """Bind the inputs that each step changes.

        They have to be bound anew: an input that is not where its reader runs is copied there once, when it is bound.
        """
        self._binding.bind_ortvalue_input("input_ids", self._ids)
        self._binding.bind_ortvalue_input("seqlens_k", self._past)
        self._binding.bind_ortvalue_input("total_sequence_length", self._total)


def _sequence_axes(spec: BaseSpec) -> dict[str, dict[int, int]]:
    """What a decoder takes whatever its weights are: new tokens, lengths, caches."""
    names = ["input_ids", "seqlens_k", "total_sequence_length", "logits_kept"]
    names += [] if spec.long_from is None else ["long_context"]
    caches = [f"past_key_values.{layer}.{part}" for layer in range(spec.layers) for part in ("key", "value")]
    return {**{name: {} for name in names}, **{name: {1: spec.kv_heads, 3: spec.head_size} for name in caches}}


def check_capacity(capacity: int, spec: BaseSpec) -> None:
    """Make sure that a base has room for a sequence.

    Raises:
        PromptTooLong: `capacity` tokens exceed its context.
    """
    if capacity > spec.context:
        raise PromptTooLong(
            f"prompt and answer take {capacity} tokens, the base has a context of {spec.context}; "
            "shorten the prompt or lower --max-tokens"
        )


def _cache_dtype(session: Session) -> type[np.float16 | np.float32]:
    """Element type of the key-value caches that a graph takes.

    Raises:
        BundleError: they differ, or are neither float32 nor float16.
    """
    found = {v.type for v in session.get_inputs() if v.name.startswith("past_key_values.")}
    if len(found) != 1 or not found <= set(_CACHE_TYPES):
        raise BundleError(f"the decoder's caches are of type {', '.join(sorted(found))}; export the bundle again")
    return _CACHE_TYPES[found.pop()]
