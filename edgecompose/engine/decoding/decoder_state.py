"""One sequence in a decoder: reads and appends tokens, forgets them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoding.decoder_pass import PassRow
from edgecompose.engine.decoding.pass_costs import PassCosts
from edgecompose.engine.decoding.pass_queue import PassQueue
from edgecompose.engine.decoding.single import Blend, Single
from edgecompose.errors import GenerationError, PromptTooLong

Float = npt.NDArray[np.float32]
#: Heads of more channels are added up in parts that depend on how many keys there are: on which side of these numbers,
#: less the row that attention gets in addition (see `edgecompose_export.graphs.block`).
_WIDE, _PARTS = 128, (31, 63)


class Owner(Protocol):
    """The decoder of a sequence."""

    spec: BaseSpec
    queue: PassQueue

    def take(self, blend: Blend) -> Single:
        """What a sequence needs to run alone under a blend."""

    def give(self, single: Single) -> None:
        """Keep it for the next sequence."""


class DecoderState:
    """One sequence: its tokens, their KV cache, and the blend that computed it.

    What it gets does not depend on the sequences that are written beside it.

    Args:
        capacity: tokens that it may have.
        chunk: tokens that are read in one pass.
    """

    def __init__(self, owner: Owner, blend: Blend, *, capacity: int, chunk: int) -> None:
        self.blend = blend
        self.tokens: list[int] = []
        self.holding: list[Single] = []  # what it runs alone with; empty while it is in a batch
        self._owner, self._spec, self._queue = owner, owner.spec, owner.queue
        self._capacity, self._chunk = capacity, chunk
        self._long = False

    @property
    def composition(self) -> str:
        """The content hash of the blend."""
        return self.blend.digest

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def room(self) -> int:
        """How many tokens it may still get."""
        return self._capacity - self.length

    @property
    def reversible_room(self) -> int:
        """How many tokens it may get and take back, as if they had never been there.

        They end where the sequence would be read again with other rotary frequencies, and where attention adds up wide
        heads in other parts.
        """
        limits = [self._capacity]
        if self._spec.long_from is not None and not self._long:
            limits.append(self._spec.long_from)
        if self._spec.head_size > _WIDE:
            limits += [limit for limit in _PARTS if self.length < limit]
        return min(limits) - self.length

    @property
    def beside(self) -> int:
        """How many other sequences were written in the last pass, and share the next one if they go on."""
        return self._queue.beside(self)

    @property
    def costs(self) -> PassCosts:
        """What the passes of this decoder cost."""
        return self._queue.costs

    @property
    def pass_tokens(self) -> int:
        """Tokens of a whole pass; a prompt is read in passes of so many, and a shorter last one."""
        return self._chunk

    def forward(self, ids: Sequence[int], *, rows: int = 1) -> Float:
        """Read tokens as a prompt, and return the logits of the last `rows` of them.

        Args:
            ids: at least one token id.
            rows: how many positions, in 1 .. len(ids).

        Returns:
            (rows, vocabulary) float32; overwritten by the next call.

        Raises:
            GenerationError: an id outside the vocabulary, more tokens than the sequence may have, or too little memory.
            BundleError: the graph fails on what it should take.
        """
        parts = [logits if rows == 1 else logits.copy() for logits in self.passes(ids, rows=rows)]
        return parts[-1] if len(parts) == 1 or rows == 1 else np.concatenate(parts)[-rows:]

    def passes(self, ids: Sequence[int], *, rows: int = 1) -> Generator[Float, None, None]:
        """The same, a pass of the graph at a time, so that a caller can do other work between the parts of a prompt.

        A sequence that is left between two passes holds the tokens that were read until then.

        Yields:
            The logits of each pass; the last ends with those of the last of `ids`. Overwritten by the next pass.
        """
        count = len(ids)
        if not 1 <= rows <= count:
            raise GenerationError(f"{rows} rows of logits were requested of {count} tokens; expected 1 to {count}")
        self._check(ids)
        if self.is_long(count) != self._long:
            ids = self._turn(ids)
            count = len(ids)
        self.leave(keep=self.length)
        self.hold().cache.grow(self.length + count, lengths=[self.length])
        for start in range(0, count, self._chunk):
            chunk = ids[start : start + self._chunk]
            later = count - start - len(chunk)
            yield self._queue.read(self, chunk, kept=min(len(chunk), max(1, rows - later)))

    def step(self, ids: Sequence[int]) -> Float:
        """Append tokens that were written, or may be: each gets what it would get in a step of its own.

        It does so to the last bit where the base is quantised, and within rounding where it is not.

        Returns:
            The logits after each of them, (len(ids), vocabulary) float32; overwritten by the next call.

        Raises:
            GenerationError, BundleError: as `forward`.
        """
        self._check(ids)
        if self.is_long(len(ids)) != self._long:
            return self.forward(self._turn(ids), rows=len(ids))
        return self._queue.write(self, ids)

    def leave(self, *, keep: int) -> None:
        """Run alone from now on, with the first `keep` tokens; call it when a sequence has written its last token."""
        self._queue.leave(self, keep=keep)
        self.rewind(min(keep, self.length))

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

    def is_long(self, count: int) -> bool:
        """Whether `count` more tokens are read with the frequencies of long sequences.

        As transformers has it: a sequence is read with one set of frequencies, and again when it passes the limit.
        """
        return self._spec.long_from is not None and self.length + count > self._spec.long_from

    def run_alone(self, ids: Sequence[int], *, kept: int, together: bool) -> Float:
        """Run the graph once; for the queue, whose turn decides when.

        The sequence has the tokens only when their keys and values are in the cache: Ctrl-C may end the run.
        """
        row = PassRow(ids, self.length, kept)
        logits = self.hold().run(row, together=together, long=self._long)
        self.tokens += ids
        return logits

    def save(self, length: int) -> npt.NDArray[Any] | None:
        """Keys and values of the first `length` tokens, as `KVCache.read` gives them.

        None where other frequencies would be used for so many tokens.
        """
        if length > self.length or self._long or (self._spec.long_from is not None and length > self._spec.long_from):
            return None
        return self.hold().cache.read(0, length=length)

    def restore(self, tokens: Sequence[int], cache: npt.NDArray[Any]) -> None:
        """Have read these tokens, whose keys and values `save` gave.

        Raises:
            GenerationError: an id outside the vocabulary, more tokens than the sequence may have, or too little memory.
        """
        self.rewind(0)
        self._check(tokens)
        self.hold().cache.grow(len(tokens), lengths=[0])
        self.hold().cache.write(0, cache)
        self.tokens += tokens

    def hold(self) -> Single:
        """What the sequence runs alone with."""
        if not self.holding:
            self.holding.append(self._owner.take(self.blend))
        return self.holding[0]

    def let_go(self) -> None:
        """Give that back, as the sequence is in a batch."""
        while self.holding:
            self._owner.give(self.holding.pop())

    def _turn(self, ids: Sequence[int]) -> list[int]:
        """Forget all tokens, as their keys were made with other frequencies; all that is to be read then."""
        self._long = not self._long
        whole = [*self.tokens, *ids]
        self.leave(keep=0)
        return whole

    def _check(self, ids: Sequence[int]) -> None:
        if len(ids) > self.room:
            raise GenerationError(f"the sequence would have {self.length + len(ids)} of {self._capacity} tokens")
        outside = next((i for i in ids if not 0 <= i < self._spec.vocabulary), None)
        if outside is not None:
            raise GenerationError(f"token id {outside} is outside the vocabulary of {self._spec.vocabulary}")


def check_capacity(capacity: int, spec: BaseSpec) -> None:
    """Make sure that a base has room for a sequence.

    Raises:
        PromptTooLong: `capacity` tokens exceed its context.
    """
    if capacity > spec.context:
        raise PromptTooLong(
            f"prompt and answer take {capacity} tokens, the base has a context of {spec.context}, "
            "its maximum context length; shorten the prompt or lower max_tokens"
        )
