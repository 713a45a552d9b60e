"""Several sequences that write in one pass, each under its own blend."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoding.blend_rows import BlendRows, is_padded
from edgecompose.engine.decoding.decoder_pass import Float, PassBinding, PassRow
from edgecompose.engine.decoding.kv_cache import KVCache
from edgecompose.engine.decoding.single import Blend, Single
from edgecompose.engine.device import Device, Session
from edgecompose.engine.merged import MergedAdapter
from edgecompose.engine.slots import bind_slots

#: Memory that an empty batch keeps for the next: fresh pages cost ten times what is copied into them.
_IDLE_BYTES = 1 << 30
#: Beyond that, rows become shorter when all sequences need so many times less.
_SHRINK = 4
#: Passes that a sequence may miss before it leaves its row to others.
_MOST_MISSED = 4


class Writer(Protocol):
    """A sequence that writes."""

    tokens: list[int]

    @property
    def blend(self) -> Blend:
        """Under which it writes."""

    @property
    def length(self) -> int:
        """Number of its tokens."""

    def hold(self) -> Single:
        """What it runs alone with."""

    def let_go(self) -> None:
        """Give that back."""

    def is_long(self, count: int) -> bool:
        """Whether `count` more tokens are read with the frequencies of long sequences."""


@dataclass(slots=True)
class _Row:
    """A sequence in a row of the cache, and how many passes it has missed since its last."""

    state: weakref.ref[Writer]
    missed: int = 0


class Batch:
    """Sequences side by side: their keys and values in the rows of one cache, their factors in those of `BlendRows`.

    A sequence joins when it first writes beside another, and stays until it leaves. It gets to the last bit what it
    gets alone (see `edgecompose_export.graphs.block`). Rows that miss a pass take part in it with a token that nobody
    reads. Not safe between threads.
    """

    def __init__(self, session: Session, spec: BaseSpec, device: Device) -> None:
        self._session, self._spec, self._device = session, spec, device
        self._cache = KVCache(session, spec, device)
        self._blends = BlendRows(spec.slots, device)
        self._rows: list[_Row] = []
        self._passes: dict[int, tuple[PassBinding, object]] = {}

    def __contains__(self, state: Writer) -> bool:
        return any(row.state() is state for row in self._rows)

    @property
    def bytes(self) -> int:
        """Memory of caches and factors."""
        return self._cache.bytes + self._blends.bytes

    def write(self, jobs: Sequence[tuple[Writer, Sequence[int]]], *, expected: int = 1) -> list[Float]:
        """Append tokens to sequences; the logits after each, (tokens, vocabulary) of each sequence.

        All of them have, or will have, their keys under the same frequencies.

        Args:
            expected: how many sequences are likely to write soon.

        Raises:
            GenerationError: memory does not suffice for the caches.
            BundleError: the graph fails on what it should take.
        """
        ids = {id(state): tokens for state, tokens in jobs}
        self._drop_absent(set(ids))
        self._join([state for state, _ in jobs], ids)
        rows, states, blends = list[PassRow](), list[Writer](), list[MergedAdapter]()
        for row in self._rows:
            state = row.state()
            assert state is not None, "absent rows were dropped"
            tokens = ids.get(id(state))
            row.missed = 0 if tokens else row.missed + 1
            rows.append(PassRow(tokens or [0], state.length, len(tokens or ())))
            states.append(state)
            assert isinstance(state.blend, MergedAdapter), "fused weights are written one by one"
            blends.append(state.blend)
        logits = self._run(rows, blends, long=jobs[0][0].is_long(len(jobs[0][1])), expected=expected)
        ends = list(itertools.accumulate(row.kept for row in rows))
        parts = {id(s): logits[end - row.kept : end].copy() for s, row, end in zip(states, rows, ends, strict=True)}
        for state, tokens in jobs:
            state.tokens += tokens
        return [parts[id(state)] for state, _ in jobs]

    def leave(self, state: Writer, *, keep: int) -> None:
        """Take a sequence out; its first `keep` tokens stay in a cache of its own."""
        place = next((i for i, row in enumerate(self._rows) if row.state() is state), None)
        if place is None:
            return
        if keep:
            single = state.hold()
            single.cache.grow(keep, lengths=[0])
            single.cache.copy_row(0, self._cache, place, length=keep)
        self._remove(place)

    def clear(self) -> None:
        """Give the memory back; no sequence may be inside."""
        self._passes.clear()
        self._cache.clear()
        self._blends.clear()

    def _drop_absent(self, present: set[int]) -> None:
        """Take out rows whose sequence is gone, or has missed too many passes."""
        for place in reversed(range(len(self._rows))):
            state, missed = self._rows[place].state(), self._rows[place].missed
            if state is None:
                self._remove(place)
            elif missed >= _MOST_MISSED and id(state) not in present:
                self.leave(state, keep=state.length)

    def _remove(self, place: int) -> None:
        """Fill a row with the last one."""
        last = len(self._rows) - 1
        moved = self._rows[last].state() if place != last else None
        if moved is not None:
            self._cache.copy_row(place, self._cache, last, length=moved.length)
            self._rows[place] = self._rows[last]
        del self._rows[last]
        if not self._rows and self.bytes > _IDLE_BYTES:
            self.clear()

    def _join(self, states: Sequence[Writer], ids: dict[int, Sequence[int]]) -> None:
        new = [state for state in states if state not in self]
        inside = [row.state() for row in self._rows]
        most = max(map(len, ids.values()))  # the pass has so many tokens of each row, whatever it writes
        needs = [s.length + most for s in (*inside, *new) if s is not None]
        lengths = [0 if s is None else s.length for s in inside] + [0] * len(new)
        if new and self._cache.bytes > _IDLE_BYTES and _SHRINK * (max(needs) + 1) <= self._cache.capacity:
            self._shrink(lengths)
        self._cache.grow(max(needs), lengths=lengths)
        for state in new:
            if state.length:
                self._cache.copy_row(len(self._rows), state.hold().cache, 0, length=state.length)
            self._rows.append(_Row(weakref.ref(state)))
            state.let_go()

    def _shrink(self, lengths: Sequence[int]) -> None:
        """Make the rows of the cache as long as their tokens need, where a long sequence has left."""
        cache = KVCache(self._session, self._spec, self._device)
        cache.grow(max(lengths), lengths=[0] * len(lengths))
        for row, length in enumerate(lengths):
            if length:
                cache.copy_row(row, self._cache, row, length=length)
        cache.version += self._cache.version  # what is bound to the old one is bound again
        self._cache = cache

    def _run(self, rows: Sequence[PassRow], blends: Sequence[MergedAdapter], *, long: bool, expected: int) -> Float:
        runs = [(digest, len(list(run))) for digest, run in itertools.groupby(blend.digest for blend in blends)]
        shared = math.gcd(*(length for _, length in runs))  # so many sequences in a row have one blend
        most = max(len(row.ids) for row in rows)
        count, one = len(rows) // shared, blends[0]
        direct = count == 1 and is_padded(one)
        if not direct:
            self._blends.place(blends[::shared], expected=max(count, expected // shared))
        bound = (count, self._cache.version, one.digest if direct else self._blends.version)
        binding, earlier = self._passes.get(len(rows)) or (PassBinding(self._session, self._spec), None)
        if earlier != bound:
            binding.clear()
            self._cache.bind(binding.binding, len(rows))
            if direct:
                bind_slots(binding.binding, one, self._device, leading=(1, 1))
            else:
                self._blends.bind(binding.binding, count)
            self._passes[len(rows)] = binding, bound
        return binding.run(rows, (1, count, shared * most), long=long)
