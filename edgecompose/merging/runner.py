"""Runs the merge graphs on one device, each session opened once. Safe between threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgecompose.engine.device import Device, OrtValue, Session, View, bind, open_session, usable_cores

T = TypeVar("T")
U = TypeVar("U")
_GRAPHS = Path(__file__).with_name("graphs")


class GraphRunner:
    """The graphs that ship with the runtime, by name, on `device`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._session = functools.lru_cache(maxsize=None)(self._open)
        workers = usable_cores() if device.kind == "cpu" else 1
        self._threads = ThreadPoolExecutor(workers, "merge") if workers > 1 else None

    def copy(self, value: OrtValue, address: int) -> None:
        """Copy a (N, n) array of bytes or values to an address of the device."""
        codes = "uint8" in value.data_type()
        view = View(value, value.data_ptr(), tuple(value.shape()), np.uint8 if codes else np.float32)
        self.run("copy_codes" if codes else "copy_values", {"given": view}, address, view.shape, view.dtype)

    def run(
        self,
        graph: str,
        feeds: Mapping[str, npt.NDArray[Any] | View],
        address: int,
        shape: Sequence[int],
        dtype: type[np.generic] = np.float32,
    ) -> None:
        """Run a graph on arrays of the host and on views of the device's memory; write its result to `address`."""
        session, kind = self._session(graph), self.device.kind
        binding = session.io_binding()
        alive = [bind(binding, self.device, name, value) for name, value in feeds.items()]
        binding.bind_output("merged", kind, 0, dtype, list(shape), address)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        del alive

    def map(self, function: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """Apply a function to all items, on the cores where the device is a CPU."""
        return [function(item) for item in items] if self._threads is None else list(self._threads.map(function, items))

    def _open(self, graph: str) -> Session:
        content = (_GRAPHS / f"{graph}.onnx").read_bytes()
        threads = 1 if self.device.kind == "cpu" else None
        return open_session(content, self.device, name=f"merge {graph}", threads=threads)
