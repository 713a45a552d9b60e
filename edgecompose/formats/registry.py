"""The table of formats: what each is called, how it is recognised, read and written.

To add a format, write its functions in a module of this folder and add a row here; `edgecompose compose --format`,
`edgecompose bundle add-task`, their help and their messages follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import AdapterError
from edgecompose.formats.checkpoint import Advance, FloatCheckpoint
from edgecompose.formats.gguf import is_gguf_lora, read_gguf_lora, write_gguf_lora
from edgecompose.formats.lora import LoraSource
from edgecompose.formats.merged_model import write_merged_model
from edgecompose.formats.mlx import is_mlx_folder, read_mlx_folder
from edgecompose.formats.onnx_adapter import write_onnx_adapter
from edgecompose.formats.peft import is_peft_folder, read_peft_folder, write_peft_folder


@dataclass(frozen=True, slots=True)
class AdapterFormat:
    """One row. A format that is only written has no `detect` and `read`; one that is only read has no writer.

    Attributes:
        name: as in `--format`.
        help: what it is, as in 'a folder of PEFT'.
        detect: whether the file or folder at a path has this format.
        read: the float factors of the adapter at a path, for a base.
        write: writes a blend for a base to a path, and returns the files; refuses a path that is taken.
        write_into: the same of a format that holds the weights of the base too, which it takes from a float checkpoint;
            it calls its last argument with the bytes that it has worked through, as they are.
    """

    name: str
    help: str
    detect: Callable[[Path], bool] | None = None
    read: Callable[[Path, BaseSpec], LoraSource] | None = None
    write: Callable[[MergedAdapter, Path, BaseSpec], list[Path]] | None = None
    write_into: Callable[[MergedAdapter, FloatCheckpoint, Path, BaseSpec, Advance], list[Path]] | None = None


_ROWS = (
    AdapterFormat(
        name="gguf",
        help="a LoRA file of llama.cpp (GGUF)",
        detect=is_gguf_lora,
        read=read_gguf_lora,
        write=lambda merged, path, base: [write_gguf_lora(merged, path, base)],
    ),
    AdapterFormat(
        name="mlx",
        help="an adapter folder of mlx_lm",
        detect=is_mlx_folder,
        read=lambda path, base: read_mlx_folder(path),
    ),
    AdapterFormat(  # after mlx, whose folders have an adapter_config.json too
        name="peft",
        help="a LoRA folder of PEFT",
        detect=is_peft_folder,
        read=lambda path, base: read_peft_folder(path),
        write=write_peft_folder,
    ),
    AdapterFormat(
        name="onnx-adapter",
        help="a file for onnxruntime.LoraAdapter",
        write=lambda merged, path, base: [write_onnx_adapter(merged, path)],
    ),
    AdapterFormat(
        name="merged",
        help="a whole model in a Hugging Face folder",
        write_into=write_merged_model,
    ),
)
#: Format -> row; the first whose `detect` is true reads a path.
FORMATS: Mapping[str, AdapterFormat] = MappingProxyType({row.name: row for row in _ROWS})
READABLE = tuple(row for row in _ROWS if row.read is not None)
WRITABLE = tuple(row for row in _ROWS if row.write is not None or row.write_into is not None)
_READABLE_NAMES = " or ".join(row.help for row in READABLE)


def detect_format(path: Path) -> AdapterFormat | None:
    """The format of the adapter at a path, None where it has none of them.

    Raises:
        AdapterError: a file is called .gguf and is no GGUF file.
    """
    return next((row for row in READABLE if row.detect is not None and row.detect(path)), None)


def unknown_format(path: Path) -> str:
    """A message for a path where `detect_format` is None."""
    kind = "file" if path.is_file() else "folder"
    problem = f"is a {kind} of no known format" if path.exists() else "is missing"
    return f"adapter '{path}' {problem}; give {_READABLE_NAMES}"


def read_adapter(path: Path, base: BaseSpec) -> LoraSource:
    """The float factors of an adapter in any of the formats.

    Raises:
        AdapterError: no adapter lies there, or it cannot be used; see the reader of each format.
    """
    row = detect_format(path)
    if row is None or row.read is None:
        raise AdapterError(unknown_format(path))
    return row.read(path, base)
