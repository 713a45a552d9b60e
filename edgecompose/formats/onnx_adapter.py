"""Writes a blend as ONNX Runtime's adapter file, for programs that run the decoder graph themselves."""

from __future__ import annotations

from pathlib import Path

from edgecompose.bundle.atomic import new_file
from edgecompose.engine.device import write_adapter_file
from edgecompose.engine.merged import MergedAdapter, require_adapters
from edgecompose.engine.slots import slot_tensors
from edgecompose.errors import MergeError


def write_onnx_adapter(merged: MergedAdapter, path: Path) -> Path:
    """Write a file that `onnxruntime.LoraAdapter().Load` reads: a float32 tensor for each slot of the decoder graph.

    It takes effect through `RunOptions.add_active_adapter` and `session.run`; ONNX Runtime ignores it under IOBinding.

    Raises:
        MergeError: the blend holds no adapter, or the file exists.
        OSError: the file cannot be written.
    """
    require_adapters(merged)
    with new_file(path) as work:
        if path.exists():
            raise MergeError(f"'{path}' exists; give another file")
        write_adapter_file(work, slot_tensors(merged))
    return path
