"""Chooses the device, says why, and opens ONNX Runtime sessions on it; the only module that imports onnxruntime.

Telemetry of ONNX Runtime is switched off here, before the import (its Linux wheels report home by default).
"""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np

if sys.platform == "linux" and "usearch.compiled" in sys.modules and "onnxruntime" not in sys.modules:
    # onnxruntime 1.32 crashes while it loads into a process where usearch 2.26 is loaded; the other order works
    raise ImportError(
        "usearch was imported before onnxruntime, which would crash this process; "
        "import onnxruntime (or edgecompose.composer) before usearch"
    )
try:
    import onnxruntime
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        "onnxruntime is not installed; install one of the extras: pip install 'edgecompose[cpu]' or 'edgecompose[gpu]'"
    ) from error

from edgecompose.errors import BundleError, DeviceError
from edgecompose.guard.native import native

DeviceRequest = Literal["auto", "cpu", "cuda"]
#: ONNX Runtime has no type information; these names say which of its objects is meant.
OrtValue: TypeAlias = Any
Session: TypeAlias = Any
IOBinding: TypeAlias = Any

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
#: How a provider is opened. CUDA by itself rounds the inputs of float32 products to TF32, 10 bits of mantissa, which
#: moves results by about 1e-3; with that off they are float32's, in another order of summation.
_PROVIDER_OPTIONS = {_CUDA: {"use_tf32": "0"}}
_PACKAGES = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A part of memory that `owner`, an OrtValue, keeps alive: where it begins, its shape and element type."""

    owner: OrtValue
    address: int
    shape: tuple[int, ...]
    dtype: type[np.generic] = np.float32


@dataclass(frozen=True, slots=True)
class Device:
    """Where sessions run, and why.

    `kind` is 'cpu' or 'cuda'; `providers` are ONNX Runtime's, the preferred one first.
    """

    kind: Literal["cpu", "cuda"]
    providers: tuple[str, ...]
    reason: str

    def empty(self, shape: Sequence[int], dtype: type[np.generic] = np.float32) -> OrtValue:
        """An uninitialised tensor on this device."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self.kind, 0)

    def buffer(self, values: int) -> OrtValue:
        """Uninitialised flat float32 memory on this device; on a CPU in large pages, whose first touch is cheaper."""
        if self.kind == "cpu":
            return onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(values, np.float32))
        return self.empty((values,))

    def place(self, array: np.ndarray[Any, Any]) -> OrtValue:
        """A copy of `array` on this device."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.kind, 0)


def bind(binding: IOBinding, device: Device, name: str, value: np.ndarray[Any, Any] | View) -> object:
    """Let a graph read memory of the device where it lies, or an array of the host.

    Returns:
        What must be kept alive until the graph has run.
    """
    if isinstance(value, View):
        binding.bind_input(name, device.kind, 0, value.dtype, list(value.shape), value.address)
        return value.owner
    if device.kind == "cpu":
        value = np.ascontiguousarray(value)
        binding.bind_input(name, "cpu", 0, value.dtype.type, list(value.shape), value.ctypes.data)
        return value
    placed = device.place(value)
    binding.bind_ortvalue_input(name, placed)
    return placed


def choose_device(request: DeviceRequest = "auto") -> Device:
    """The device for `request`.

    Args:
        request: 'cpu'; 'cuda', which must work; 'auto', which takes CUDA when it works.

    Raises:
        DeviceError: 'cuda' was requested and cannot be used, or the request is unknown.
    """
    if request not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"device '{request}' is unknown; use auto, cpu or cuda")
    if request == "cpu":
        return host("cpu was requested")
    obstacle = _cuda_obstacle()
    if obstacle is None:
        return Device("cuda", (_CUDA, _CPU), f"cuda works ({'requested' if request == 'cuda' else 'chosen by auto'})")
    if request == "cuda":
        raise DeviceError(
            f"device cuda cannot be used: {obstacle}; "
            "install the extra [gpu] and a CUDA driver, or use --device cpu ('edgecompose doctor' shows more)"
        )
    return host(f"auto fell back to cpu: {obstacle}")


def host(reason: str) -> Device:
    """The CPU, for what runs there on every device."""
    return Device("cpu", (_CPU,), reason)


def open_session(
    graph: Path | bytes,
    device: Device,
    *,
    name: str,
    threads: int | None = None,
    folder: Path | None = None,
    data: Mapping[str, bytes] = MappingProxyType({}),
) -> Session:
    """Open a graph on the device and make sure that it really runs there.

    Args:
        graph: path of an .onnx file (whose hash the caller has checked), or its bytes.
        name: what the graph is, for messages.
        threads: intra-op threads; None takes one per core, of those that this process may run on.
        folder: where the tensors of a graph that is given as bytes lie, if not in it.
        data: contents of files beside the graph that are not to be mapped; they are copied.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        DeviceError: the session fell back to another provider than `device` asks for.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # memory patterns are made for inputs of one shape; with others they cost memory and, on a CPU, time
    options.enable_mem_pattern = device.kind != "cpu"
    if threads is None and usable_cores() < (os.cpu_count() or 1):
        threads = usable_cores()  # ONNX Runtime counts the machine's, and two threads on one core wait for each other
    if threads is not None:
        options.intra_op_num_threads = threads
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if data:
        sizes = [len(content) for content in data.values()]
        options.add_external_initializers_from_files_in_memory(list(data), list(data.values()), sizes)
    source = graph if isinstance(graph, bytes) else str(graph)
    with native(BundleError, f"ONNX Runtime refuses the {name} graph"):
        session = onnxruntime.InferenceSession(source, options, providers=_with_options(device.providers))
        # names that are no UTF-8 fail when they are read
        _ = [v.name for v in (*session.get_inputs(), *session.get_outputs(), *session.get_overridable_initializers())]
    landed = session.get_providers()[0]
    if landed != device.providers[0]:
        raise DeviceError(
            f"the {name} graph landed on {landed}, expected {device.providers[0]}; "
            "use --device cpu, or see 'edgecompose doctor'"
        )
    return session


def run_bound(session: Session, binding: IOBinding, *, name: str) -> None:
    """Run a graph on what is bound to its inputs and outputs.

    Args:
        name: what the graph is, for messages.

    Raises:
        BundleError: the graph fails on values that it should take.
    """
    with native(BundleError, f"the {name} graph cannot be run"):
        session.run_with_iobinding(binding)


def write_adapter_file(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write tensors by name as ONNX Runtime's adapter file.

    Raises:
        OSError: the file cannot be written.
    """
    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(1)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}
    content.set_parameters(values)
    path.touch()  # ONNX Runtime says nothing where it cannot write
    try:
        content.export_adapter(str(path))
        onnxruntime.AdapterFormat.read_adapter(str(path))  # nor where the disk was full before the end
    except Exception as error:  # ONNX Runtime raises its own classes, all derived from Exception
        raise OSError(errno.ENOSPC, "cannot be written as a whole", str(path)) from error


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def installed_packages() -> dict[str, str]:
    """Version of every ONNX Runtime distribution that is installed (two of them is a fault)."""
    from importlib import metadata  # it takes 10 ms, and only the doctor needs it

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def available_providers() -> tuple[str, ...]:
    """Providers that this build of ONNX Runtime knows; it may still fail to load one."""
    return tuple(onnxruntime.get_available_providers())


def has_cuda_provider() -> bool:
    """Whether this build of ONNX Runtime has the CUDA provider; loading it may still fail."""
    return _CUDA in available_providers()


def runtime_version() -> str:
    """Version of ONNX Runtime."""
    return str(onnxruntime.__version__)


def processor() -> str:
    """Names the kind of CPU, as far as the system says: kernels of another kind round otherwise."""
    cpuinfo = Path("/proc/cpuinfo")
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system
        return f"{platform.machine()} {platform.processor()}"
    kept = {line for line in lines if line.partition("\t")[0].strip(" :") in ("model name", "flags", "Features")}
    return "\n".join([platform.machine(), *sorted(kept)])


def telemetry_disabled() -> bool:
    """Whether ONNX Runtime's telemetry was disabled before it was imported."""
    return os.environ.get("ORT_DISABLE_TELEMETRY") == "1"


def _with_options(providers: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Providers as ONNX Runtime takes them."""
    return [(name, _PROVIDER_OPTIONS.get(name, {})) for name in providers]


def _cuda_obstacle() -> str | None:
    """Why CUDA cannot be used, None when it can; opens a one-node session to be sure."""
    if not has_cuda_provider():
        return f"the installed onnxruntime {runtime_version()} has no CUDA provider"
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        preload()
    probe = Path(__file__).with_name("probe.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(probe.read_bytes(), options, providers=_with_options((_CUDA, _CPU)))
    except Exception as error:  # any failure here means that the device is not usable
        return f"opening a session failed ({error})"
    if session.get_providers()[0] != _CUDA:
        return "the provider is built in but could not be loaded (driver or CUDA libraries missing)"
    return None
