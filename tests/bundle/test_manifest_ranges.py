"""Numbers, texts and files of a manifest that are out of range, or contradict each other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from edgecompose.bundle.manifest import manifest_from_json, manifest_to_json
from edgecompose.errors import ManifestInvalid
from tests.bundle.manifests import Json, Place, changed, example


@pytest.fixture
def valid(tmp_path: Path) -> dict[str, Json]:
    return dict(json.loads(manifest_to_json(example(tmp_path))))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("defaults", "temperature"), math.nan),
        (("defaults", "temperature"), math.inf),
        (("defaults", "temperature"), 0),
        (("defaults", "temperature"), -1.0),
        (("defaults", "nucleus"), 0),
        (("defaults", "nucleus"), 1.01),
        (("defaults", "nucleus"), math.nan),
        (("defaults", "density"), 0),
        (("defaults", "density"), math.nan),
        (("defaults", "neighbours"), 0),
        (("defaults", "max_tokens"), 0),
        (("defaults", "majority_sign"), "mean"),
        (("index", "vectors"), 6),
        (("index", "vectors"), -5),
        (("index", "dimension"), 9),
        (("index", "dtype"), "i8"),
        (("embedder", "dimension"), 0),
        (("embedder", "max_length"), 7),
        (("embedder", "pooling"), 3),
        (("adapters", "one", "bits"), 3),
        (("adapters", "one", "bits"), 4.0),
        (("adapters", "one", "bits"), True),
        (("base", "slots"), []),
        (("base", "slots", 0, "layers"), 0),
        (("base", "context"), 0),
        (("base", "vocabulary"), 0),
        (("base", "end_tokens"), [1, "2"]),
        (("tasks", "alpha", "examples"), -1),
        (("tasks", "alpha", "examples"), 3),
        (("tasks", "alpha", "first_key"), -1),
        (("tasks", "beta", "first_key"), 1),
        (("tasks", "alpha", "adapters"), {"x": 1.0}),
        (("files", "index.usearch", "bytes"), -1),
        (("files", "index.usearch", "sha256"), "F" * 64),
        (("files", "index.usearch", "sha256"), "f" * 63),
        (("files", "index.usearch", "sha256"), "f" * 64 + "\n"),
        (("base", "graph"), "base/absent.onnx"),
        (("index", "texts"), "absent.jsonl"),
        (("files",), {}),
        pytest.param(("defaults", "temperature"), 10**400, id="beyond float"),
        (("name",), "x" * 300),
        (("name",), "\x1b]0;title\x07"),
        (("base", "source"), "two\nlines"),
        (("base", "precision"), "\ud800"),
        (("base", "context"), 2**40),
        (("base", "kv_heads"), 2**31),
        (("base", "head_size"), 10**300),
        (("base", "vocabulary"), 2**31),
        (("base", "long_from"), 0),
        (("base", "end_tokens"), [1, 300]),
        (("base", "end_tokens"), [-1]),
        (("base", "slots", 0, "n_in"), 2**40),
        (("base", "slots", 0, "layers"), 10**9),
        (("base", "distance", "kl"), math.nan),
        (("base", "distance", "top1"), math.inf),
        (("base", "tokenizer"), "base/model.onnx"),
        (("embedder", "tokenizer"), "base/tokenizer.json"),
        (("embedder", "cosine"), 2),
        (("embedder", "dimension"), 2**31),
        (("embedder", "ends"), 2**63),
        (("tasks", "alpha", "examples"), 2**53),
        (("tasks", "beta", "first_key"), 2**53),
        (("tasks", "alpha", "adapters"), {"one": 1e308}),
        (("tasks", "alpha", "adapters"), {"one": -1.1e6}),
        (("tasks", "alpha", "adapters"), {"one": math.nan}),
        (("tasks", "alpha", "similarity"), math.nan),
        (("tasks", "alpha", "similarity"), -0.5),
        (("tasks", "alpha", "similarity"), 1e300),
        (("adapters", "one", "rank"), 0),
        (("adapters", "one", "rank"), 2 * 10**9),
        (("adapters", "one", "error"), -1),
        (("adapters", "one", "error"), math.nan),
        (("adapters", "one", "base"), "c" * 64),
        (("adapters", "one", "file"), "adapters/two.safetensors"),
        (("inner_products",), {"one": {"two": math.inf}}),
        (("inner_products",), {"one": {"one": -1.0}}),
        (("inner_products",), {"two": {"one": 1.0}}),
        (("inner_products",), {"one": {"three": 1.0}}),
        (("files", "index.usearch", "bytes"), 2**63),
        (("files", "manifest.json"), {"sha256": "0" * 64, "bytes": 1}),
        (("files", "base//x"), {"sha256": "0" * 64, "bytes": 1}),
        (("files", "./x"), {"sha256": "0" * 64, "bytes": 1}),
        (("files", "x\x1b"), {"sha256": "0" * 64, "bytes": 1}),
        (("files", "x" * 2000), {"sha256": "0" * 64, "bytes": 1}),
        (("adapters", "one", "source"), {"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}),
    ],
)
def test_values_out_of_range_are_refused(valid: dict[str, Json], place: Place, value: Json) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        manifest_from_json(changed(valid, place, value))
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600
    str(caught.value).encode()  # no lone surrogate


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pooling", "cls"),
        ("normalize", False),
        ("ends", 2),
        ("max_length", 8),
        ("identity", "f" * 64),
        ("precision", "fp32"),
    ],
)
def test_vectors_of_another_embedder_are_refused(valid: dict[str, Json], field: str, value: Json) -> None:
    if field == "ends":
        valid["embedder"]["dimension"] = valid["index"]["dimension"] = 9
    with pytest.raises(ManifestInvalid, match=r"made by the embedder 'e{64}/int8/mean/64/unit', the bundle's is"):
        manifest_from_json(changed(valid, ("embedder", field), value))


def test_a_whitened_index_has_no_more_dimensions_than_the_embedder(valid: dict[str, Json]) -> None:
    valid["files"]["whitening.safetensors"] = {"sha256": "0" * 64, "bytes": 1}
    valid["index"] |= {"whitening": "whitening.safetensors", "dimension": 4}
    assert manifest_from_json(json.dumps(valid)).index.dimension == 4
    with pytest.raises(ManifestInvalid, match="9-dimensional, the embedder 8-dimensional"):
        manifest_from_json(changed(valid, ("index", "dimension"), 9))


@pytest.mark.parametrize(
    ("verdict", "ci95"),
    [("helps", [-0.1, 0.2]), ("hurts", [0.1, 0.2]), ("unproven", [0.1, 0.2]), ("helps", [0.2, 0.1]), ("helps", [0.1])],
)
def test_a_verdict_that_contradicts_its_interval_is_refused(
    valid: dict[str, Json], verdict: str, ci95: list[float]
) -> None:
    measured = {"examples": 9, "base": 0.1, "accuracy": 0.2}
    right = measured | {"verdict": "helps", "ci95": [0.1, 0.2]}
    assert manifest_from_json(changed(valid, ("adapters", "one", "validation"), right))
    with pytest.raises(ManifestInvalid, match="validation"):
        manifest_from_json(
            changed(valid, ("adapters", "one", "validation"), measured | {"verdict": verdict, "ci95": ci95})
        )


def test_a_field_that_is_there_twice_is_refused(valid: dict[str, Json]) -> None:
    text = json.dumps(valid).replace('"name": "test"', '"name": "test", "name": "other"')
    with pytest.raises(ManifestInvalid, match="twice the field 'name'"):
        manifest_from_json(text)


def test_millions_of_objects_are_refused_before_they_take_memory() -> None:
    with pytest.raises(ManifestInvalid, match="more than 500,000 objects and arrays"):
        manifest_from_json('{"schema_version": 5, "files": [' + "[]," * 2_000_000 + "[]]}")


def test_a_half_of_a_surrogate_pair_is_refused_and_a_pair_is_taken(valid: dict[str, Json]) -> None:
    for half in ("\ud83d", "\udc00", "\ude00\ud83d"):
        for place in (("adapters", "one", "source", "note"), ("adapters", "one", "source", half)):
            with pytest.raises(ManifestInvalid, match="half of a surrogate pair"):
                manifest_from_json(changed(valid, place, half))
    text = changed(valid, ("adapters", "one", "source", "note"), "\U0001f600")
    assert "\\ud83d\\ude00" in text
    assert manifest_from_json(text).adapters["one"].source["note"] == "\U0001f600"
