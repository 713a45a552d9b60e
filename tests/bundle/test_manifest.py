"""The manifest's contract: whatever the text, the answer is a valid manifest or an error of ours."""

from __future__ import annotations

import dataclasses
import json
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
from tests.bundle.manifests import Json, Place, at, changed, example
from tests.factories import TEXT

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
    return example(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def valid(manifest: Manifest) -> dict[str, Json]:
    return dict(json.loads(manifest_to_json(manifest)))


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
    del at(valid, place)[field]
    with pytest.raises(ManifestInvalid, match=f"lacks fields: {field}"):
        manifest_from_json(json.dumps(valid))


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_field_is_refused(valid: dict[str, Json], place: Place) -> None:
    with pytest.raises(ManifestInvalid, match="unknown fields: surprise"):
        manifest_from_json(changed(valid, (*place, "surprise"), 1))


@pytest.mark.parametrize(("place", "field"), [(p, f.name) for p, f in _fields()])
def test_no_field_takes_a_value_of_another_type(valid: dict[str, Json], place: Place, field: str) -> None:
    right = at(valid, place).get(field)
    wrong = [5] if isinstance(right, dict) or field == "distance" else {"a": 5}
    with pytest.raises(ManifestInvalid, match="expected|unknown fields"):
        manifest_from_json(changed(valid, (*place, field), wrong))


@pytest.mark.parametrize(("place", "field"), [(p, f.name) for p, f in _fields() if re.search("int|float", str(f.type))])
def test_a_boolean_or_a_text_is_no_number(valid: dict[str, Json], place: Place, field: str) -> None:
    for wrong in (True, "8"):
        with pytest.raises(ManifestInvalid, match="expected"):
            manifest_from_json(changed(valid, (*place, field), wrong))


@pytest.mark.parametrize("version", [None, 0, SCHEMA_VERSION + 1, "1", [1]])
def test_another_schema_is_refused_whatever_else_it_says(version: Json) -> None:
    with pytest.raises(UnsupportedSchema, match="update edgecompose"):
        manifest_from_json(json.dumps({"schema_version": version, "a field of the future": 1}))


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
        manifest_from_json(changed(valid, ("files", path), {"sha256": "0" * 64, "bytes": 1}))


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
            manifest_from_json(changed(valid, (kind, name), valid[kind][one]))


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 100])
def test_a_good_name_is_taken(name: str) -> None:
    assert check_name(name) == name


def test_tasks_without_examples_share_no_key(valid: dict[str, Json]) -> None:
    text = changed(valid, ("tasks", "empty"), {"adapters": {"one": 1.0}, "first_key": 2, "examples": 0})
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
        result = json.loads(changed(result, place, data.draw(JSON)))
    try:
        manifest_from_json(json.dumps(result))
    except EdgeComposeError:
        return


@given(TEXT | JSON.map(json.dumps) | st.dictionaries(TEXT, JSON).map(lambda d: json.dumps(d | {"schema_version": 1})))
def test_random_text_raises_nothing_but_our_errors(text: str) -> None:
    with pytest.raises(EdgeComposeError):
        manifest_from_json(text)
