"""ONNX Runtime on a device: the bandwidth of its copies, and the nodes of our graphs that it runs elsewhere."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from benchmarks.measuring.timing import time_rounds
from edgecompose.engine.device import Device, open_session

#: Values copied (float32), far more than the last cache holds.
COPIED = {"cuda": 1 << 26, "cpu": 1 << 24}
_FLOAT32, _OPSET, _IR = 1, 21, 10


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes read and written a second (GB/s, 1e9) by ONNX Runtime's operators from device memory to device memory.

    `identity` is a plain copy; `add` adds a buffer to itself, which a CPU spreads over its cores.
    """

    identity: float
    add: float

    @property
    def best(self) -> float:
        """The copy bandwidth of the device: the larger of both."""
        return max(self.identity, self.add)


@dataclass(frozen=True, slots=True)
class Placement:
    """Nodes of an optimised graph, and those of them, counted by operator, that run on another device."""

    graph: str
    nodes: int
    elsewhere: dict[str, int]


def copy_bandwidth(device: Device, rounds: int) -> Bandwidth:
    """Measure a device's copy bandwidth, both ends bound on it."""
    values = COPIED[device.kind]
    source, target = device.place(np.ones(values, np.float32)), device.buffer(values)

    def measure(operator: str, inputs: int) -> float:
        session = open_session(one_node(operator, inputs), device, name=f"copy ({operator})")
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", source)
        binding.bind_ortvalue_output("y", target)

        def run() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return 2 * 4 * values / time_rounds(run, max(rounds, 3)).least / 1e6

    return Bandwidth(measure("Identity", 1), measure("Add", 2))


def one_node(operator: str, inputs: int) -> bytes:
    """An ONNX model, y = operator(x, ...) with x as each input, float32 (n,).

    It is written by hand, since onnx is not installed at run time.
    """
    node = b"".join(_field(1, b"x") for _ in range(inputs)) + _field(2, b"y") + _field(4, operator.encode())
    tensor = _field(1, _FLOAT32) + _field(2, _field(1, _field(2, b"n")))
    x, y = (_field(1, name) + _field(2, _field(1, tensor)) for name in (b"x", b"y"))
    graph = _field(1, node) + _field(2, b"copy") + _field(11, x) + _field(12, y)
    return _field(1, _IR) + _field(7, graph) + _field(8, _field(2, _OPSET))


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer: a number, or bytes (a string, or a message)."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    content = bytearray()
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    content.append(value)
    return bytes(content)


def placements(device: Device, graphs: Mapping[str, Path]) -> Iterator[Placement]:
    """The placement of our merge graphs and of other graphs.

    A node without a kernel on the device runs on the CPU, and its inputs and results are copied.
    """
    folder = resources.files("edgecompose.merging") / "graphs"
    shipped = sorted(item.name for item in folder.iterdir() if item.name.endswith(".onnx"))
    for name in shipped:
        yield _placement(device, f"merge {name.removesuffix('.onnx')}", (folder / name).read_bytes())
    for name, path in graphs.items():
        yield _placement(device, name, str(path))


def _placement(device: Device, name: str, graph: bytes | str) -> Placement:
    import onnxruntime  # after edgecompose.device, which switches its telemetry off

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=list(device.providers))
    total, elsewhere = 0, collections.Counter[str]()
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        total += len(nodes)
        if part.ep_name != session.get_providers()[0]:
            elsewhere.update(node.op_type for node in nodes)
    return Placement(name, total, dict(elsewhere))
