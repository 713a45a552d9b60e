"""One sequence in a decoder: reads and appends tokens, forgets them."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.device import OrtValue, Session, host, run_bound
from edgecompose.engine.kv_cache import KVCache
from edgecompose.errors import GenerationError, PromptTooLong

Float = npt.NDArray[np.float32]
_HOST = host("inputs and logits live on the host")


class DecoderState:
    """One sequence: its tokens, their KV cache, and the content hash of the blend that computed it."""

    def __init__(self, session: Session, cache: KVCache, *, spec: BaseSpec, capacity: int, chunk: int) -> None:
        self.composition = cache.blend.digest
        self.tokens: list[int] = []
        self._session, self._spec, self._capacity, self._chunk = session, spec, capacity, chunk
        self._cache, self._binding = cache, cache.binding
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

    @property
    def pass_tokens(self) -> int:
        """Tokens of a whole pass; a prompt is read in passes of so many, and a shorter last one."""
        return self._chunk

    def forward(self, ids: Sequence[int], *, rows: int = 1) -> Float:
        """Append tokens and return the logits of the last `rows` of them.

        Args:
            ids: at least one token id.
            rows: how many positions, in 1 .. len(ids).

        Returns:
            (rows, vocabulary) float32; overwritten by the next call.

        Raises:
            GenerationError: an id outside the vocabulary, or more tokens than the sequence may have.
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
        if self.length + count > self._capacity:
            raise GenerationError(f"the sequence would have {self.length + count} of {self._capacity} tokens")
        outside = next((i for i in ids if not 0 <= i < self._spec.vocabulary), None)
        if outside is not None:
            raise GenerationError(f"token id {outside} is outside the vocabulary of {self._spec.vocabulary}")
        if self._turns_long(self.length + count):
            ids = [*self.tokens, *ids]
            self.rewind(0)
            count = len(ids)
        self._cache.grow(self.length + count, length=self.length)
        for start in range(0, count, self._chunk):
            chunk = ids[start : start + self._chunk]
            later = count - start - len(chunk)
            yield self._pass(chunk, min(len(chunk), max(1, rows - later)))

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

    def _pass(self, ids: Sequence[int], rows: int) -> Float:
        """Run the graph once.

        The sequence has the tokens only when their keys and values are in the cache: Ctrl-C may end the run.
        """
        length = self.length + len(ids)
        self._resize(len(ids), rows)
        self._ids.update_inplace(np.array([ids], np.int64))
        self._past.update_inplace(np.array([length - 1], np.int32))
        self._total.update_inplace(np.array(length, np.int32))
        self._bind_step()
        run_bound(self._session, self._binding, name="decoder")
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

    def _resize(self, count: int, rows: int) -> None:
        """Make ids and logits of another shape (a bound output of a stale shape is an error)."""
        if (count, rows) == self._shape:
            return
        self._ids = _HOST.empty((1, count), np.int64)
        self._logits = _HOST.empty((1, rows, self._spec.vocabulary))
        self._binding.bind_ortvalue_input("logits_kept", _HOST.place(np.array([rows], np.int64)))
        self._binding.bind_ortvalue_output("logits", self._logits)
        self._shape = (count, rows)

    def _bind_step(self) -> None:
        """Bind the inputs that each step changes.

        They have to be bound anew: an input that is not where its reader runs is copied there once, when it is bound.
        """
        self._binding.bind_ortvalue_input("input_ids", self._ids)
        self._binding.bind_ortvalue_input("seqlens_k", self._past)
        self._binding.bind_ortvalue_input("total_sequence_length", self._total)


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
