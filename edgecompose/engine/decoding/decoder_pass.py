"""One pass of a decoder graph over new tokens of one sequence or several, and what is bound for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.device import IOBinding, OrtValue, Session, host, run_bound

Float = npt.NDArray[np.float32]
_HOST = host("inputs and logits live on the host")


@dataclass(frozen=True, slots=True)
class PassRow:
    """One sequence's part of a pass.

    Attributes:
        ids: its new tokens, at least one.
        past: how many it has in the cache.
        kept: of how many of the new tokens, the last ones, logits are computed.
    """

    ids: Sequence[int]
    past: int
    kept: int


class PassBinding:
    """A binding of a decoder's session, and the tensors of the host that each pass changes.

    Caches and slots are bound to `binding` by their owners, and anew only when they change.

    Args:
        slots: whether the graph has any.
    """

    def __init__(self, session: Session, spec: BaseSpec, *, slots: bool = True) -> None:
        self.binding: IOBinding = session.io_binding()
        self._session, self._spec, self._slots = session, spec, slots
        self._values: dict[str, OrtValue] = {}
        self._logits: OrtValue = None
        self._long: bool | None = None

    def run(self, rows: Sequence[PassRow], layout: tuple[int, int, int], *, long: bool = False) -> Float:
        """Compute the keys and values of new tokens, and logits.

        Args:
            rows: one for each row of the cache that is bound.
            layout: how tokens meet the blends: (tokens, 1, 1) all of one sequence at once, (1, blends, tokens of each
                blend) token by token.
            long: with the frequencies of long sequences, where the base has two sets.

        Returns:
            (kept of all rows, vocabulary) float32, row after row; overwritten by the next pass.

        Raises:
            BundleError: the graph fails on what it should take.
        """
        most = max(len(row.ids) for row in rows)
        ids = np.zeros((len(rows), most), np.int64)
        kept: list[int] = []
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = row.ids
            end = number * most + len(row.ids)
            kept += range(end - row.kept, end)
        # attention gets one more row of each sequence than there are tokens
        lengths = np.array([row.past + len(row.ids) for row in rows], np.int32)
        self._feed("input_ids", ids)
        self._feed("seqlens_k", lengths)
        self._feed("query_seqlens", np.array([len(row.ids) + 1 for row in rows], np.int32))
        self._feed("total_sequence_length", np.array(lengths.max() + 1, np.int32))
        self._feed("logits_at", np.array(kept, np.int64))
        if self._slots:
            self._feed("slot_layout", np.array(layout, np.int64))
        if self._spec.long_from is not None and long != self._long:
            self._feed("long_context", np.array([long], np.int64))
            self._long = long
        if self._logits is None or self._logits.shape()[0] != len(kept):
            self._logits = _HOST.empty((len(kept), self._spec.vocabulary))
            self.binding.bind_ortvalue_output("logits", self._logits)  # one of a stale shape is an error
        run_bound(self._session, self.binding, name="decoder")
        return np.asarray(self._logits.numpy(), np.float32)

    def clear(self) -> None:
        """Bind nothing any more."""
        self.binding.clear_binding_inputs()
        self.binding.clear_binding_outputs()
        self._logits = self._long = None

    def _feed(self, name: str, value: npt.NDArray[np.generic]) -> None:
        """Bind an input.

        It has to be bound anew in each pass: an input that is not where its reader runs is copied there once, when it
        is bound.
        """
        tensor = self._values.get(name)
        if tensor is None or tuple(tensor.shape()) != value.shape:
            tensor = self._values[name] = _HOST.empty(value.shape, value.dtype.type)
        tensor.update_inplace(value)
        self.binding.bind_ortvalue_input(name, tensor)
