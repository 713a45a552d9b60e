"""The keys and values of sequences on the device: one buffer of each a layer, a row a sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.device import Device, IOBinding, OrtValue, Session, host
from edgecompose.engine.memory import copy_memory
from edgecompose.errors import BundleError, GenerationError
from edgecompose.guard.native import native

#: A cache has room for a multiple of so many tokens, so that the next sequence under the same blend can have it.
_CAPACITY_STEP = 64
_HOST = host("attention in float32 runs on the host")
CacheValue = np.float16 | np.float32 | np.int8 | np.uint8
#: Element types that a cache may have, as ONNX Runtime calls them.
_TYPES: dict[str, type[CacheValue]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,  # two codes of 4 bits
}


class KVCache:
    """Buffers (rows, kv_heads, capacity, width) that attention reads and extends in place; see `cache_width`.

    Attributes:
        rows: of so many sequences.
        capacity: tokens of each; attention takes one more than a sequence has.
        version: changes when the buffers do, so that what is bound to them has to be bound again.
    """

    def __init__(self, session: Session, spec: BaseSpec, device: Device) -> None:
        self.rows = self.capacity = self.version = 0
        self._spec = spec
        self._dtype = cache_dtype(session)
        self._width = cache_width(self._spec, self._dtype)
        # Attention in float32 has no CUDA kernel, so ONNX Runtime runs it on the CPU whatever the device. A cache on
        # the device would then be copied to the CPU when it is bound and never again: the prompt would be right and
        # every later step wrong. On the host it is right, and slow: queries, keys and values are copied at every step.
        self._device = _HOST if self._dtype is np.float32 else device
        self._buffers: dict[str, OrtValue] = {}

    @property
    def bytes(self) -> int:
        """Size of the buffers."""
        return 2 * self._spec.layers * math.prod(self._shape) * np.dtype(self._dtype).itemsize

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return self.rows, self._spec.kv_heads, self.capacity, self._width

    def grow(self, tokens: int, *, lengths: Sequence[int]) -> None:
        """Make room for one sequence for each of `lengths` and `tokens` tokens of each, at least; twice as much as
        before where there is less. The first tokens of each row stay, as many as `lengths` says.

        Raises:
            GenerationError: memory does not suffice; there is room for as many tokens as before.
        """
        rows, most = self.rows, self._spec.context + 1
        if len(lengths) > rows:
            rows = max(len(lengths), 2 * rows)
        capacity = self.capacity
        if tokens + 1 > capacity:
            capacity = max(tokens + 1, min(2 * capacity, most))
            capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        if (rows, capacity) == (self.rows, self.capacity):
            return
        advice = "shorten the prompt, or lower --max-tokens"
        with native(GenerationError, f"there is no room for the caches of {capacity} tokens", advice):
            shape = (rows, self._spec.kv_heads, capacity, self._width)
            grown = {}
            for name in self._names():
                grown[name] = self._device.empty(shape, self._dtype)
                for row, length in enumerate(lengths):
                    if length:
                        self._copy(grown[name], row, self._buffers[name], row, length)
        self._buffers, self.rows, self.capacity = grown, rows, capacity
        self.version += 1

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers, self.rows, self.capacity = {}, 0, 0
        self.version += 1

    def copy_row(self, row: int, source: KVCache, source_row: int, *, length: int) -> None:
        """Take the first `length` tokens of a row of another cache, or of this one."""
        for name in self._names():
            self._copy(self._buffers[name], row, source._buffers[name], source_row, length)

    def read(self, row: int, *, length: int) -> npt.NDArray[Any]:
        """A copy, on the host, of the first `length` tokens of a row; on a CPU only.

        Returns:
            (2 * layers, kv_heads, length, width), keys and values of each layer in turn.
        """
        values = np.empty((len(self._names()), self._spec.kv_heads, length, self._width), self._dtype)
        for buffer, address, size in self._runs(row, values):
            copy_memory(self._device, buffer, address, size=size)
        return values

    def write(self, row: int, values: npt.NDArray[Any]) -> None:
        """Take the first tokens of a row from what `read` gave; there must be room."""
        values = np.ascontiguousarray(values, self._dtype)
        for buffer, address, size in self._runs(row, values):
            copy_memory(self._device, address, buffer, size=size)

    def _runs(self, row: int, values: npt.NDArray[Any]) -> Iterator[tuple[int, int, int]]:
        """Where the tokens of each head lie in the buffers and in values, and how many bytes they take."""
        token = values.itemsize * self._width
        for number, name in enumerate(self._names()):
            start = self._buffers[name].data_ptr()
            for head in range(self._spec.kv_heads):
                place = start + token * self.capacity * (row * self._spec.kv_heads + head)
                yield place, values[number, head].ctypes.data, values[number, head].nbytes

    def bind(self, binding: IOBinding, rows: int) -> None:
        """Let a pass read and extend the first `rows` rows."""
        shape = (rows, *self._shape[1:])
        for name, buffer in self._buffers.items():
            place = (self._device.kind, 0, self._dtype, shape, buffer.data_ptr())
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def _names(self) -> list[str]:
        return [f"{layer}.{part}" for layer in range(self._spec.layers) for part in ("key", "value")]

    def _copy(self, target: OrtValue, row: int, source: OrtValue, source_row: int, length: int) -> None:
        (_, heads, to_capacity, size), from_capacity = target.shape(), source.shape()[2]
        item = np.dtype(self._dtype).itemsize * size
        for head in range(heads):
            copy_memory(
                self._device,
                source.data_ptr() + item * from_capacity * (source_row * heads + head),
                target.data_ptr() + item * to_capacity * (row * heads + head),
                size=item * length,
            )


def cache_width(spec: BaseSpec, dtype: type[CacheValue]) -> int:
    """Elements of the cache that hold a token's key or value of one head: two codes of 4 bits are one."""
    return spec.head_size // 2 if dtype is np.uint8 else spec.head_size


def cache_dtype(session: Session) -> type[CacheValue]:
    """Element type of the caches that a graph takes.

    Raises:
        BundleError: they differ, or are of a type that no cache has.
    """
    types = {v.type for v in session.get_inputs() if v.name.startswith("past_key_values.")}
    if len(types) != 1 or not types <= set(_TYPES):
        raise BundleError(f"the decoder's caches are of type {', '.join(sorted(types))}; export the bundle again")
    return _TYPES[types.pop()]
