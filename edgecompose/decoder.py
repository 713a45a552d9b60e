"""The base model with a blend attached, one sequence at a time; knows nothing of text or sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.blend import SIDES, MergedAdapter
from edgecompose.device import Device, IOBinding, OrtValue, open_session
from edgecompose.errors import BundleError, GenerationError, PromptTooLong
from edgecompose.manifest import BaseSpec

Float = npt.NDArray[np.float32]
_HOST = Device("cpu", ("CPUExecutionProvider",), "inputs and logits live on the host")


class Decoder:
    """A session of the decoder graph. It holds no state of any sequence."""

    def __init__(self, graph: Path, spec: BaseSpec, device: Device) -> None:
        self.spec = spec
        self.device = device
        self._session = open_session(graph, device, name="decoder")
        _check_graph(self._session, spec)

    def start(self, adapter: MergedAdapter, capacity: int) -> Decoding:
        """Begin a sequence of at most `capacity` tokens under one blend.

        Raises:
            PromptTooLong: `capacity` exceeds the context of the base.
        """
        if capacity > self.spec.context:
            raise PromptTooLong(
                f"prompt and answer take {capacity} tokens, the base has a context of {self.spec.context}; "
                "shorten the prompt or lower --max-tokens"
            )
        return Decoding(self._session, self.spec, self.device, adapter, capacity)


class Decoding:
    """One sequence: its key-value cache, bound once, and the blend that every entry of it was made with.

    The cache is one buffer that attention reads and extends in place, so nothing is copied from step to step.
    """

    def __init__(self, session: Any, spec: BaseSpec, device: Device, adapter: MergedAdapter, capacity: int) -> None:
        self.composition = adapter.digest
        self.length = 0
        self._session, self._spec, self._capacity = session, spec, capacity
        self._binding: IOBinding = session.io_binding()
        self._adapter = adapter  # keeps the bound buffers alive
        self._cache = _bind_cache(self._binding, spec, device, capacity)
        _bind_slots(self._binding, adapter, device)
        self._past = _HOST.empty((1,), np.int32)
        self._total = _HOST.empty((), np.int32)
        self._binding.bind_ortvalue_input("seqlens_k", self._past)
        self._binding.bind_ortvalue_input("total_sequence_length", self._total)
        self._shape = (0, 0)
        self._ids: OrtValue = None
        self._logits: OrtValue = None

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
        row = np.array([ids], np.int64)
        if row.min() < 0 or row.max() >= self._spec.vocabulary:
            raise GenerationError(f"token id {int(row.max())} is outside the vocabulary of {self._spec.vocabulary}")
        self._resize(count, kept)
        self._ids.update_inplace(row)
        self.length += count
        self._past.update_inplace(np.array([self.length - 1], np.int32))
        self._total.update_inplace(np.array(self.length, np.int32))
        self._session.run_with_iobinding(self._binding)
        return np.asarray(self._logits.numpy()[0], np.float32)

    def rewind(self, length: int) -> None:
        """Forget all tokens after the first `length`; their cache entries are overwritten."""
        if not 0 <= length <= self.length:
            raise GenerationError(f"a sequence of {self.length} tokens cannot be rewound to {length}")
        self.length = length

    def _resize(self, count: int, kept: int) -> None:
        """Bind inputs and logits of another shape (a bound output of a stale shape is an error)."""
        if (count, kept) == self._shape:
            return
        self._ids = _HOST.empty((1, count), np.int64)
        self._logits = _HOST.empty((1, kept, self._spec.vocabulary))
        self._binding.bind_ortvalue_input("input_ids", self._ids)
        self._binding.bind_ortvalue_input("logits_kept", _HOST.place(np.array([kept], np.int64)))
        self._binding.bind_ortvalue_output("logits", self._logits)
        self._shape = (count, kept)


def _check_graph(session: Any, spec: BaseSpec) -> None:
    """Compare the graph with its description: ONNX Runtime would fail in its own words, at the first prompt."""
    found = {v.name: v.shape for v in (*session.get_inputs(), *session.get_overridable_initializers())}
    wanted: dict[str, dict[int, int]] = {}
    for layer in range(spec.layers):
        for part in ("key", "value"):
            wanted[f"past_key_values.{layer}.{part}"] = {1: spec.kv_heads, 3: spec.head_size}
    for group in spec.slots:
        for layer in range(group.layers):
            wanted[f"layers.{layer}.{group.name}.A"] = {1: group.n_in}
            wanted[f"layers.{layer}.{group.name}.B"] = {1: group.n_out}
    wanted |= {name: {} for name in ("input_ids", "seqlens_k", "total_sequence_length", "logits_kept")}
    outputs = {v.name: v.shape for v in session.get_outputs()}
    wrong = sorted(set(found) ^ set(wanted))
    wrong += [n for n, dims in wanted.items() if n in found and any(found[n][i] != size for i, size in dims.items())]
    if outputs.get("logits", [0])[-1] != spec.vocabulary:
        wrong.append("logits")
    if wrong:
        shown = ", ".join(wrong[:4]) + (" ..." if len(wrong) > 4 else "")
        raise BundleError(f"the decoder graph is not the one that the manifest describes: {shown}; export it again")


def _bind_cache(binding: IOBinding, spec: BaseSpec, device: Device, capacity: int) -> list[OrtValue]:
    shape = (1, spec.kv_heads, capacity, spec.head_size)
    buffers = []
    for layer in range(spec.layers):
        for part in ("key", "value"):
            buffer = device.empty(shape)
            binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", buffer)
            binding.bind_ortvalue_output(f"present.{layer}.{part}", buffer)
            buffers.append(buffer)
    return buffers


def _bind_slots(binding: IOBinding, adapter: MergedAdapter, device: Device) -> None:
    """Bind each layer's slots to their places in the blend's buffer, without a copy."""
    for name, module in adapter.modules.items():
        for layer in range(module.layers):
            for side in SIDES:
                address, shape = adapter.address(name, side, layer)
                binding.bind_input(f"layers.{layer}.{name}.{side}", device.kind, 0, np.float32, shape, address)
