"""Exports a sentence encoder to ONNX, float32 or int8, and records its pooling, maximum length and normalisation."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from edgecompose.bundle.atomic import new_files
from edgecompose.bundle.files import sha256_of
from edgecompose.bundle.records import read_json, value_from_json
from edgecompose.bundle.specs import EmbedderSpec
from edgecompose.engine.device import choose_device
from edgecompose.errors import ExportError
from edgecompose.retrieval.embedder import Embedder
from edgecompose.retrieval.pooling import POOLINGS
from edgecompose_export.calibration.prompts import calibration_prompts
from edgecompose_export.graphs.onnx_files import save_graph

EmbedderPrecision = Literal["f32", "int8"]
SPEC_FILE = "embedder.json"
#: What configurations call the width where it is not `hidden_size`, by model type.
_WIDTHS = {"distilbert": "dim"}
_LARGEST = 1 << 20
#: Tokens at each end of a prompt, where the question usually is.
ENDS = 32


def export_embedder(
    source: Path,
    output: Path,
    precision: EmbedderPrecision = "int8",
    *,
    ends: int = ENDS,
    advance: Callable[[str], None] = lambda step: None,
) -> EmbedderSpec:
    """Write `encoder.onnx` and its data, `tokenizer.json` and `embedder.json` to `output`.

    Args:
        source: a sentence-transformers folder (config.json, modules.json, safetensors, tokenizer.json).
        ends: tokens at each end of a prompt that are also pooled separately; 0 for none.

    Raises:
        ExportError: not such a folder, a pooling that is not in `edgecompose.retrieval.pooling`, or `output` holds an
            embedder.
        InUse: another process is writing to it.
        OSError: it cannot be written; nothing is there then.
    """
    spec = describe_encoder(source, precision, ends)
    with new_files(output, last=SPEC_FILE) as new:
        if (output / SPEC_FILE).exists():
            raise ExportError(f"'{output}' already holds an exported embedder; remove it or give another folder")
        with tempfile.TemporaryDirectory(dir=new, prefix=".build-") as scratch:
            work = Path(scratch)
            advance("exporting through optimum")
            _export_float(source, work)
            shutil.copyfile(source / "tokenizer.json", new / spec.tokenizer)
            shutil.copyfile(work / "model.onnx", work / "float.onnx")
            if precision == "int8":
                advance("quantising to int8")
                _quantize(work / "float.onnx", work / "int8.onnx")
            save_graph(onnx.load(work / ("int8.onnx" if precision == "int8" else "float.onnx")), new / spec.graph)
            advance("comparing with float32")
            spec = dataclasses.replace(spec, cosine=_mean_cosine(work / "float.onnx", new, spec))
        (new / SPEC_FILE).write_text(json.dumps(dataclasses.asdict(spec), indent=1) + "\n", encoding="utf-8")
    return spec


def describe_encoder(source: Path, precision: EmbedderPrecision, ends: int = 0) -> EmbedderSpec:
    """The description of the sentence encoder in a folder."""
    config = _read_object(source / "config.json")
    weights = source / "model.safetensors"
    for file in (weights, source / "tokenizer.json"):
        if not file.is_file():
            raise ExportError(f"embedder '{source}' has no {file.name}; give a sentence-transformers folder")
    modules = _read_modules(source)
    types = [str(m.get("type", "")).rsplit(".", 1)[-1] for m in modules]
    unknown = sorted(set(types) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ExportError(
            f"embedder '{source}' has modules {', '.join(unknown)}, expected Transformer, Pooling and Normalize"
        )
    pooling = _pooling(source, modules)
    width = _size(source, config, _WIDTHS.get(str(config.get("model_type")), "hidden_size"))
    positions = _size(source, config, "max_position_embeddings")
    bert = _read_object(source / "sentence_bert_config.json", optional=True)
    longest = _size(source, bert, "max_seq_length") if bert.get("max_seq_length") is not None else positions
    return EmbedderSpec(
        graph="encoder.onnx",
        tokenizer="tokenizer.json",
        identity=sha256_of(weights),
        precision=precision,
        dimension=width * (3 if ends else 1),
        ends=ends,
        max_length=min(longest, positions),
        pooling=pooling,
        normalize="Normalize" in types or not modules,
        source=source.name,
    )


def read_embedder_spec(folder: Path) -> EmbedderSpec:
    """The description that `export_embedder` wrote."""
    path = folder / SPEC_FILE
    if not path.is_file():
        raise ExportError(f"'{folder}' holds no {SPEC_FILE}; make it with 'edgecompose-export embedder'")
    return value_from_json(EmbedderSpec, read_json(path, ExportError, "export the embedder again"), SPEC_FILE)


def open_embedder(folder: Path) -> tuple[Embedder, EmbedderSpec]:
    """An exported embedder, ready to use on the CPU."""
    spec = read_embedder_spec(folder)
    device = choose_device("cpu")
    return Embedder(folder / spec.graph, folder / spec.tokenizer, spec=spec, device=device), spec


def _pooling(source: Path, modules: list[dict[str, Any]]) -> str:
    """The pooling, by flags or, since sentence-transformers 5.4, by name."""
    folder = next((m.get("path", "") for m in modules if str(m.get("type", "")).endswith("Pooling")), None)
    if folder is None:
        return "mean"
    if not isinstance(folder, str) or Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise ExportError(
            f"embedder '{source}': modules.json has the path {folder!r:.60}, expected one inside the folder"
        )
    config = _read_object(source / folder / "config.json")
    modes = config.get("pooling_mode", [])
    names = sorted(str(mode) for mode in (modes if isinstance(modes, list) else [modes]))
    flags = sorted(k for k, v in config.items() if k.startswith("pooling_mode_") and v is True)
    name = next(
        (row.name for row in POOLINGS.values() if names == [row.name] or (not names and flags == [row.flag])), None
    )
    if name is None:
        shown = ", ".join(names or flags)
        raise ExportError(f"embedder '{source}' pools by {shown or 'nothing':.200}, expected {' or '.join(POOLINGS)}")
    return name


def _size(source: Path, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise ExportError(
            f"embedder '{source}': its configuration has no usable {name} ({value!r:.40}), expected a whole number"
        )
    return value


def _read_modules(source: Path) -> list[dict[str, Any]]:
    modules = _read_json(source / "modules.json", optional=True) or []
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ExportError(
            f"embedder '{source}': modules.json is no list of objects; give a sentence-transformers folder"
        )
    return modules


def _read_object(path: Path, *, optional: bool = False) -> dict[str, Any]:
    fields = _read_json(path, optional=optional)
    if fields is None and optional:
        return {}
    if not isinstance(fields, dict):
        raise ExportError(f"'{path}' holds no object; give a sentence-transformers folder")
    return fields


def _read_json(path: Path, *, optional: bool = False) -> Any:
    if optional and not path.is_file():
        return None
    return read_json(path, ExportError, "give a sentence-transformers folder")


def _export_float(source: Path, work: Path) -> None:
    from optimum.exporters.onnx import main_export

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns of constants in transformers' own mask code
            main_export(
                str(source),
                output=work,
                task="feature-extraction",
                library_name="transformers",
                local_files_only=True,
                do_validation=False,
            )
    except Exception as error:  # optimum, transformers and torch raise classes of all kinds on damaged files
        raise ExportError(f"embedder '{source}' cannot be exported by optimum: {error}") from error


def _quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it recommends a pre-processing step that optimum has done
    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)


def _mean_cosine(reference: Path, output: Path, spec: EmbedderSpec) -> float:
    device = choose_device("cpu")
    exact = Embedder(reference, output / spec.tokenizer, spec=spec, device=device)
    near = Embedder(output / spec.graph, output / spec.tokenizer, spec=spec, device=device)
    pairs = [(exact.embed(text), near.embed(text)) for text in calibration_prompts()]
    return float(np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs]))
