"""The manifest's contract: whatever the text, the answer is a valid manifest or an error of ours."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.bundle.manifest import (
    SCHEMA_VERSION,
    Defaults,
    Manifest,
    check_name,
    check_path,
    manifest_from_json,
    manifest_to_json,
)
from edgecompose.bundle.specs import (
    AdapterSpec,
    BaseSpec,
    Distance,
    EmbedderSpec,
    FileEntry,
    IndexSpec,
    SlotGroup,
    TaskSpec,
)
from edgecompose.errors import EdgeComposeError, ManifestInvalid, UnsupportedSchema
from tests.factories import TEXT, write_bundle

Json = Any
Place = tuple[str | int, ...]
#: Where each kind of object lies in the manifest of `valid`.
PLACES: dict[Place, type[Any]] = {
    (): Manifest,
    ("base",): BaseSpec,
    ("base", "slots", 0): SlotGroup,
    ("base", "distance"): Distance,
    ("embedder",): EmbedderSpec,
    ("index",): IndexSpec,
    ("tasks", "alpha"): TaskSpec,
    ("adapters", "one"): AdapterSpec,
    ("defaults",): Defaults,
    ("files", "index.usearch"): FileEntry,
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    written = write_bundle(tmp_path_factory.mktemp("bundle"))
    return dataclasses.replace(written, base=dataclasses.replace(written.base, distance=Distance(0.01, 0.97, 8, 512)))


@pytest.fixture
def valid(manifest: Manifest) -> dict[str, Json]:
    return dict(json.loads(manifest_to_json(manifest)))


def _at(root: Json, place: Place) -> Json:
    for key in place:
        root = root[key]
    return root


def _with(root: Json, place: Place, value: Json) -> str:
    changed = copy.deepcopy(root)
    _at(changed, place[:-1])[place[-1]] = value
    return json.dumps(changed)


def _fields() -> Iterator[tuple[Place, dataclasses.Field[Any]]]:
    for place, kind in PLACES.items():
        for field in dataclasses.fields(kind):
            if (*place, field.name) != ("schema_version",):
                yield place, field


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def test_round_trip(manifest: Manifest) -> None:
    text = manifest_to_json(manifest)
    assert manifest_from_json(text) == manifest
    assert manifest_to_json(manifest_from_json(text)) == text
    assert text.endswith("}\n")


def test_derived_values(manifest: Manifest) -> None:
    assert manifest.base.layers == 3
    assert set(manifest.named_files()) <= set(manifest.files)


@pytest.mark.parametrize(("place", "field"), [(p, f.name) for p, f in _fields() if _is_required(f)])
def test_every_required_field_is_required(valid: dict[str, Json], place: Place, field: str) -> None:
    del _at(valid, place)[field]
    with pytest.raises(ManifestInvalid, match=f"lacks fields: {field}"):
        manifest_from_json(json.dumps(valid))


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_field_is_refused(valid: dict[str, Json], place: Place) -> None:
    with pytest.raises(ManifestInvalid, match="unknown fields: surprise"):
        manifest_from_json(_with(valid, (*place, "surprise"), 1))


@pytest.mark.parametrize(("place", "field"), [(p, f.name) for p, f in _fields()])
def test_no_field_takes_a_value_of_another_type(valid: dict[str, Json], place: Place, field: str) -> None:
    right = _at(valid, place).get(field)
    wrong = [5] if isinstance(right, dict) or field == "distance" else {"a": 5}
    with pytest.raises(ManifestInvalid, match="expected|unknown fields"):
        manifest_from_json(_with(valid, (*place, field), wrong))


@pytest.mark.parametrize(("place", "field"), [(p, f.name) for p, f in _fields() if re.search("int|float", str(f.type))])
def test_a_boolean_or_a_text_is_no_number(valid: dict[str, Json], place: Place, field: str) -> None:
    for wrong in (True, "8"):
        with pytest.raises(ManifestInvalid, match="expected"):
            manifest_from_json(_with(valid, (*place, field), wrong))


@pytest.mark.parametrize("version", [None, 0, SCHEMA_VERSION + 1, "1", [1]])
def test_another_schema_is_refused_whatever_else_it_says(version: Json) -> None:
    with pytest.raises(UnsupportedSchema, match="update edgecompose"):
        manifest_from_json(json.dumps({"schema_version": version, "a field of the future": 1}))


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
        manifest_from_json(_with(valid, place, value))
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
        manifest_from_json(_with(valid, ("embedder", field), value))


def test_a_whitened_index_has_no_more_dimensions_than_the_embedder(valid: dict[str, Json]) -> None:
    valid["files"]["whitening.safetensors"] = {"sha256": "0" * 64, "bytes": 1}
    valid["index"] |= {"whitening": "whitening.safetensors", "dimension": 4}
    assert manifest_from_json(json.dumps(valid)).index.dimension == 4
    with pytest.raises(ManifestInvalid, match="9-dimensional, the embedder 8-dimensional"):
        manifest_from_json(_with(valid, ("index", "dimension"), 9))


@pytest.mark.parametrize(
    ("verdict", "ci95"),
    [("helps", [-0.1, 0.2]), ("hurts", [0.1, 0.2]), ("unproven", [0.1, 0.2]), ("helps", [0.2, 0.1]), ("helps", [0.1])],
)
def test_a_verdict_that_contradicts_its_interval_is_refused(
    valid: dict[str, Json], verdict: str, ci95: list[float]
) -> None:
    measured = {"examples": 9, "base": 0.1, "accuracy": 0.2}
    right = measured | {"verdict": "helps", "ci95": [0.1, 0.2]}
    assert manifest_from_json(_with(valid, ("adapters", "one", "validation"), right))
    with pytest.raises(ManifestInvalid, match="validation"):
        manifest_from_json(
            _with(valid, ("adapters", "one", "validation"), measured | {"verdict": verdict, "ci95": ci95})
        )


def test_a_field_that_is_there_twice_is_refused(valid: dict[str, Json]) -> None:
    text = json.dumps(valid).replace('"name": "test"', '"name": "test", "name": "other"')
    with pytest.raises(ManifestInvalid, match="twice the field 'name'"):
        manifest_from_json(text)


BAD_PATHS = [
    "/etc/x",
    "../x",
    "a/../../x",
    "a/..",
    "..",
    "C:\\x",
    "C:/x",
    "a\\b",
    "",
    ".",
    "a\0b",
    "//x",
    "\\\\host\\x",
]
BAD_NAMES = ["", ".", "..", ".hidden", "-x", "a/b", "a\\b", "a b", "é", "a\n", "a\0", "x" * 101]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_that_leaves_the_bundle_is_refused(valid: dict[str, Json], path: str) -> None:
    with pytest.raises(ManifestInvalid, match="leaves the bundle"):
        check_path(path)
    with pytest.raises(ManifestInvalid, match="leaves the bundle"):
        manifest_from_json(_with(valid, ("files", path), {"sha256": "0" * 64, "bytes": 1}))


@pytest.mark.parametrize("path", ["x", "a/b.onnx", "a.b/c-d_e", "..x/y..", "with space/é.json"])
def test_a_path_inside_the_bundle_is_taken(path: str) -> None:
    assert check_path(path) == path


@given(TEXT | st.lists(st.sampled_from("./\\:ab")).map("".join))
def test_a_path_that_is_taken_stays_inside(path: str) -> None:
    try:
        check_path(path)
    except ManifestInvalid:
        return
    assert Path("/bundle", path).is_relative_to("/bundle")
    assert ".." not in Path(path).parts


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused(valid: dict[str, Json], name: str) -> None:
    with pytest.raises(ManifestInvalid, match="is not allowed"):
        check_name(name)
    for kind, one in (("tasks", "alpha"), ("adapters", "one")):
        with pytest.raises(ManifestInvalid, match="is not allowed"):
            manifest_from_json(_with(valid, (kind, name), valid[kind][one]))


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 100])
def test_a_good_name_is_taken(name: str) -> None:
    assert check_name(name) == name


def test_tasks_without_examples_share_no_key(valid: dict[str, Json]) -> None:
    text = _with(valid, ("tasks", "empty"), {"adapters": {"one": 1.0}, "first_key": 2, "examples": 0})
    assert manifest_from_json(text).tasks["empty"].examples == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        "\ufeff{}",
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"schema_version": ' + "1" * 5000 + "}", id="5000 digits"),
    ],
)
def test_what_is_not_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(EdgeComposeError):
        manifest_from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([10**400, -(10**400)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def _places(root: Json, place: Place = ()) -> list[Place]:
    items = root.items() if isinstance(root, dict) else enumerate(root) if isinstance(root, list) else ()
    return [p for key, value in items for p in ((*place, key), *_places(value, (*place, key)))]


@given(st.data())
def test_random_values_anywhere_raise_nothing_but_our_errors(manifest: Manifest, data: st.DataObject) -> None:
    result = json.loads(manifest_to_json(manifest))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(_places(result)))
        result = json.loads(_with(result, place, data.draw(JSON)))
    try:
        manifest_from_json(json.dumps(result))
    except EdgeComposeError:
        return


@given(TEXT | JSON.map(json.dumps) | st.dictionaries(TEXT, JSON).map(lambda d: json.dumps(d | {"schema_version": 1})))
def test_random_text_raises_nothing_but_our_errors(text: str) -> None:
    with pytest.raises(EdgeComposeError):
        manifest_from_json(text)
