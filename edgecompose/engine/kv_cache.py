"""The keys and values of one sequence on the device, bound to a decoder's session."""

from __future__ import annotations

import numpy as np

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.device import Device, IOBinding, OrtValue, Session, host
from edgecompose.engine.fusing import FusedWeights
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import BundleError, GenerationError
from edgecompose.guard.native import native

#: A cache has room for a multiple of so many tokens, so that the next sequence under the same blend can have it.
_CAPACITY_STEP = 64
_HOST = host("attention in float32 runs on the host")
#: Element types that a cache may have, as ONNX Runtime calls them.
_TYPES: dict[str, type[np.float16 | np.float32]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class KVCache:
    """A binding of a decoder's session with one buffer of keys and one of values a layer.

    Attention reads and extends the buffers in place. `blend` is the one whose memory the session reads, so that every
    entry was computed with it. The element type, float32 or float16, is the graph's.
    """

    def __init__(self, session: Session, spec: BaseSpec, device: Device, blend: MergedAdapter | FusedWeights) -> None:
        self.binding: IOBinding = session.io_binding()
        self.blend = blend
        self.capacity = 0
        self._spec = spec
        self._dtype = cache_dtype(session)
        # Attention in float32 has no CUDA kernel, so ONNX Runtime runs it on the CPU whatever the device. A cache on
        # the device would then be copied to the CPU when it is bound and never again: the prompt would be right and
        # every later step wrong. On the host it is right, and slow: queries, keys and values are copied at every step.
        self._device = _HOST if self._dtype is np.float32 else device
        self._buffers: dict[str, OrtValue] = {}

    def grow(self, capacity: int, *, length: int) -> None:
        """Make room for `capacity` tokens at least, at least twice as many as before; the first `length` stay.

        Raises:
            GenerationError: memory does not suffice; there is room for as many tokens as before.
        """
        if capacity <= self.capacity:
            return
        tokens = max(capacity, 2 * self.capacity)
        tokens = min(-(-tokens // _CAPACITY_STEP) * _CAPACITY_STEP, self._spec.context)
        advice = "shorten the prompt, or lower --max-tokens"
        with native(GenerationError, f"there is no room for the caches of {tokens} tokens", advice):
            for layer in range(self._spec.layers):
                for part in ("key", "value"):
                    name = f"{layer}.{part}"
                    buffer = self._grown(self._buffers.get(name), tokens, length)
                    self.binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
                    self.binding.bind_ortvalue_output(f"present.{name}", buffer)
                    self._buffers[name] = buffer
        self.capacity = tokens

    def _grown(self, old: OrtValue, capacity: int, length: int) -> OrtValue:
        """A buffer for `capacity` tokens with the first `length` tokens of the old one."""
        shape = (1, self._spec.kv_heads, capacity, self._spec.head_size)
        if not length:
            return self._device.empty(shape, self._dtype)
        values = np.empty(shape, self._dtype)
        values[:, :, :length] = old.numpy()[:, :, :length]
        return self._device.place(values)


def cache_dtype(session: Session) -> type[np.float16 | np.float32]:
    """Element type of the caches that a graph takes.

    Raises:
        BundleError: they differ, or are neither float32 nor float16.
    """
    types = {v.type for v in session.get_inputs() if v.name.startswith("past_key_values.")}
    if len(types) != 1 or not types <= set(_TYPES):
        raise BundleError(f"the decoder's caches are of type {', '.join(sorted(types))}; export the bundle again")
    return _TYPES[types.pop()]
