"""Parts of a manifest refuse values that are out of range."""

from __future__ import annotations

from typing import Any

import pytest

from edgecompose.bundle.specs import BaseSpec, EmbedderSpec, SlotGroup
from edgecompose.errors import ManifestInvalid

SLOTS = (SlotGroup("q_proj", 2, 8, 8), SlotGroup("down_proj", 3, 16, 8))


def base(**fields: Any) -> BaseSpec:
    values: dict[str, Any] = {
        "graph": "decoder.onnx",
        "tokenizer": "tokenizer.json",
        "identity": "a" * 64,
        "precision": "int8",
        "context": 128,
        "kv_heads": 2,
        "head_size": 8,
        "vocabulary": 300,
        "end_tokens": (1,),
        "slots": SLOTS,
    }
    return BaseSpec(**(values | fields))


def embedder(**fields: Any) -> EmbedderSpec:
    values: dict[str, Any] = {
        "graph": "encoder.onnx",
        "tokenizer": "tokenizer.json",
        "identity": "b" * 64,
        "precision": "int8",
        "dimension": 12,
        "max_length": 64,
        "pooling": "mean",
        "normalize": True,
    }
    return EmbedderSpec(**(values | fields))


def test_a_base_has_as_many_blocks_as_its_longest_group_of_slots() -> None:
    assert base().layers == 3


@pytest.mark.parametrize(
    "fields", [{"context": 0}, {"kv_heads": 0}, {"head_size": 0}, {"vocabulary": 0}, {"slots": ()}]
)
def test_a_base_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ManifestInvalid):
        base(**fields)


@pytest.mark.parametrize("fields", [{"dimension": 0}, {"max_length": 7}, {"ends": -1}, {"ends": 4, "dimension": 13}])
def test_an_embedder_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    assert embedder(ends=4).ends == 4
    with pytest.raises(ManifestInvalid):
        embedder(**fields)
