"""base.json: the description of an exported base."""

from __future__ import annotations

from pathlib import Path

from edgecompose.bundle.records import read_json, value_from_json
from edgecompose.bundle.specs import BaseSpec
from edgecompose.errors import ExportError
from edgecompose_export.base.precision import Precision
from edgecompose_export.base.source import Base
from edgecompose_export.graphs.decoder import slot_groups

SPEC_FILE = "base.json"


def read_base_spec(folder: Path) -> BaseSpec:
    """The description that `export_base` wrote."""
    path = folder / SPEC_FILE
    if not path.is_file():
        raise ExportError(f"'{folder}' holds no {SPEC_FILE}; make it with 'edgecompose-export base'")
    return value_from_json(BaseSpec, read_json(path, ExportError, "export the base again"), SPEC_FILE)


def describe_base(base: Base, precision: Precision) -> BaseSpec:
    """The description of a base before its distance is measured."""
    config, tokenizer = base.weights.config, base.tokenizer
    return BaseSpec(
        graph="decoder.onnx",
        tokenizer="tokenizer.json",
        identity=base.identity,
        precision=precision,
        context=config.context,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        vocabulary=config.vocabulary,
        end_tokens=tokenizer.end_tokens,
        slots=slot_groups(config),
        chat_template=None if tokenizer.template is None else "chat_template.jinja",
        source=base.weights.name,
        architecture=config.architecture.name,
        long_from=config.long_from,
    )
