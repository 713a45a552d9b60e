"""Memory: a pool of buffers on a device for blends, and what was freed given back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # giving memory back needs no ONNX Runtime
    from edgecompose.engine.device import Device, OrtValue, Session

#: A buffer is used again for less than it can hold, down to this share.
_LEAST_USE = 0.5
#: Alignment of data in a buffer, in values (64 bytes).
_ALIGNMENT = 16


def aligned(values: int) -> int:
    """A number of values, rounded up so that what lies behind them in a buffer begins where vectors may be read."""
    return -(-values // _ALIGNMENT) * _ALIGNMENT


class BufferPool:
    """Flat float32 buffers on one device. Fresh pages cost more than a merge does, so that idle buffers are kept: the
    last one, and others up to `idle_bytes`.
    """

    def __init__(self, device: Device, *, idle_bytes: int = 64 << 20) -> None:
        self._device, self._limit = device, idle_bytes
        self._idle: list[tuple[int, OrtValue]] = []
        self._lock = threading.RLock()  # a blend may be collected, and give its buffer back, at any moment

    def take(self, values: int) -> OrtValue:
        """A buffer of at least `values` float32 values, of undefined content."""
        with self._lock:
            fits = [entry for entry in self._idle if values * _LEAST_USE <= entry[0] * _LEAST_USE <= values]
            if fits:
                chosen = min(fits, key=lambda entry: entry[0])
                self._idle = [entry for entry in self._idle if entry is not chosen]
                return chosen[1]
        return self._device.buffer(values)

    def give(self, buffer: OrtValue) -> None:
        """Return a buffer that is no longer read."""
        with self._lock:
            self._idle.append((buffer.shape()[0], buffer))
            while len(self._idle) > 1 and sum(4 * size for size, _ in self._idle) > self._limit:
                self._idle.pop(0)


def release_freed_memory() -> None:
    """Let glibc give back the pages that it keeps of what was freed; elsewhere nothing is done.

    It keeps them for the process, which never asks for as much again once its models are loaded.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # other C libraries, such as musl, have none and keep less
            trim(0)


def copy_memory(device: Device, source: int, target: int, *, size: int) -> None:
    """Copy `size` bytes from one address of a device to another; the two places do not overlap."""
    if device.kind == "cpu":
        ctypes.memmove(target, source, size)
        return
    import numpy as np

    binding = _copy_session(device).io_binding()
    binding.bind_input("x", device.kind, 0, np.uint8, [size], source)
    binding.bind_output("y", device.kind, 0, np.uint8, [size], target)
    binding.synchronize_inputs()
    _copy_session(device).run_with_iobinding(binding)
    binding.synchronize_outputs()


@functools.lru_cache(maxsize=1)
def _copy_session(device: Device) -> Session:
    from edgecompose.engine.device import open_session

    return open_session(Path(__file__).with_name("copy.onnx").read_bytes(), device, name="copy")
