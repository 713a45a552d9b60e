"""The files that a graph reads are known before it is opened, wherever in the graph their names are."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.bundle.files import Bundle, describe_file, read_manifest
from edgecompose.bundle.manifest import MANIFEST_FILE, manifest_to_json
from edgecompose.engine.graph_file import external_data, graph_path
from edgecompose.errors import BundleError, FileDamaged
from tests.attack.mutations import mutate_bytes
from tests.factories import write_bundle

GRAPH = "base/model.onnx"


def number(value: int) -> bytes:
    """A number as protobuf writes it."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(key: int, content: bytes) -> bytes:
    return number(key << 3 | 2) + number(len(content)) + content


def entry(key: str, value: str) -> bytes:
    return field(13, field(1, key.encode()) + field(2, value.encode()))


def tensor(location: str = "x.data", offset: str = "8", length: str = "16") -> bytes:
    return field(8, b"w") + entry("location", location) + entry("offset", offset) + entry("length", length)


def model(graph: bytes) -> bytes:
    return b"\x08\x0a" + field(7, graph)


def attribute(content: bytes) -> bytes:
    return field(1, b"name") + content


#: Every place of a model that can hold a tensor.
HOLDERS: dict[str, Callable[[bytes], bytes]] = {
    "initializer": lambda t: model(field(5, t)),
    "values of a sparse initializer": lambda t: model(field(15, field(1, t))),
    "indices of a sparse initializer": lambda t: model(field(15, field(2, t))),
    "attribute": lambda t: model(field(1, field(5, attribute(field(5, t))))),
    "attributes": lambda t: model(field(1, field(5, attribute(field(10, field(8, b"a")) + field(10, t))))),
    "sparse attribute": lambda t: model(field(1, field(5, attribute(field(22, field(1, t)))))),
    "sparse attributes": lambda t: model(field(1, field(5, attribute(field(23, field(2, t)))))),
    "subgraph": lambda t: model(field(1, field(5, attribute(field(6, field(5, t)))))),
    "subgraphs": lambda t: model(field(1, field(5, attribute(field(11, field(5, t)))))),
    "subgraph of a subgraph": lambda t: model(
        field(1, field(5, field(6, field(1, field(5, field(6, field(5, t))))))),
    ),
    "function": lambda t: field(25, field(7, field(5, field(5, t)))),
    "default of a function": lambda t: field(25, field(11, field(5, t))),
    "training": lambda t: field(20, field(1, field(5, t))),
    "the second of two graphs": lambda t: model(b"") + model(field(5, t)),
}


@pytest.mark.parametrize("place", HOLDERS)
def test_a_file_is_seen_wherever_a_tensor_may_be(place: str) -> None:
    (data,) = external_data(HOLDERS[place](tensor()), "g.onnx")
    assert (data.location, data.end) == ("x.data", 24)


EVASIONS: dict[str, bytes] = {
    "value before key": field(8, b"w") + field(13, field(2, b"evil") + field(1, b"location")),
    "a longer way to write a length": field(13, b"\x0a\x88\x80\x00location" + field(2, b"evil")),
    "a longer way to write a tag": field(13, b"\x8a\x00\x08location" + field(2, b"evil")),
    "two values": field(13, field(1, b"location") + field(2, b"good") + field(2, b"evil")),
    "two entries": entry("location", "good") + entry("location", "evil"),
    "without a length": entry("location", "evil"),
    "values of a tensor beside": field(9, b"1234") + entry("location", "evil"),
}


@pytest.mark.parametrize("kind", EVASIONS)
def test_another_spelling_hides_no_file(kind: str) -> None:
    places = external_data(model(field(5, EVASIONS[kind])), "g.onnx")
    assert "evil" in {data.location for data in places}


def test_a_name_that_is_left_out_is_the_empty_one() -> None:
    (data,) = external_data(model(field(5, field(13, field(1, b"location")))), "g.onnx")
    assert data.location == ""


def test_a_graph_without_files_has_none() -> None:
    assert external_data(model(field(5, field(8, b"location") + field(9, b"123"))), "g.onnx") == []
    assert external_data(b"", "g.onnx") == []


BROKEN: dict[str, bytes] = {
    "a length beyond the end": b"\x3a\x7flocation",
    "a huge length": b"\x3a" + b"\xff" * 9 + b"\x01location",
    "a number without end": b"\x08" + b"\xff" * 20 + b"location",
    "a tag without end": b"\xff" * 20,
    "a group": b"\x3b" + b"location",
    "a fixed field beyond the end": b"\x09\x00",
    "text": b"location of nothing",
    "ONNX Runtime's own format": b"\x20\0\0\0ORTM" + bytes(40),
    "an offset that is no number": model(field(5, tensor(offset="-8"))),
    "an offset of many digits": model(field(5, tensor(offset="9" * 30))),
    "an entry with two keys": model(field(5, field(13, field(1, b"offset") + field(1, b"location") + field(2, b"x")))),
    "a length with a sign": model(field(5, tensor(length="+1"))),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_graph_is_one_error(kind: str) -> None:
    with pytest.raises(BundleError, match=r"graph 'g.onnx' is no ONNX graph: .*; export"):
        external_data(BROKEN[kind], "g.onnx")


def test_a_graph_that_is_nested_without_end_is_one_error() -> None:
    content = field(5, tensor())
    for _ in range(2000):
        content = field(1, field(5, field(6, content)))
    with pytest.raises(BundleError, match="nested deeper than 100 messages"):
        external_data(model(content), "g.onnx")


@given(st.binary(max_size=80) | st.binary(max_size=40).map(lambda b: b + b"location" + b))
def test_any_bytes_give_places_or_one_error(content: bytes) -> None:
    for whole in (content, model(content), model(field(5, content))):
        try:
            external_data(whole, "g.onnx")
        except BundleError:
            continue


def test_damaged_graphs_give_places_or_one_error() -> None:
    rng = random.Random(0)
    sound = b"".join(make(tensor()) for make in HOLDERS.values())
    for _ in range(300):
        try:
            external_data(mutate_bytes(rng, sound), "g.onnx")
        except BundleError:
            continue


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def _write(root: Path, name: str, content: bytes) -> None:
    (root / name).write_bytes(content)
    manifest = read_manifest(root)
    if name in manifest.files:
        files = manifest.files | {name: describe_file(root / name)}
        text = manifest_to_json(dataclasses.replace(manifest, files=files))
        (root / MANIFEST_FILE).write_text(text, encoding="utf-8")


UNNAMED = (
    "evil.data",
    "../index.usearch",
    "/etc/passwd",
    "",
    ".",
    "./model.onnx.data",
    "base/model.onnx",
    "*/_ORT_MEM_ADDR_/*",
    "..\\x",
)


def test_a_graph_may_read_what_the_manifest_names_and_no_other_file(root: Path) -> None:
    _write(root, GRAPH, model(field(5, tensor("model.onnx.data", "0", "16"))))
    assert graph_path(Bundle(root), GRAPH) == root / GRAPH
    (root / "base/evil.data").write_bytes(b"x" * 100)
    for location in UNNAMED:
        _write(root, GRAPH, model(field(5, tensor(location))))
        with pytest.raises(BundleError, match=r"graph 'base/model.onnx' reads the file .* manifest does not name"):
            graph_path(Bundle(root), GRAPH)


def test_a_graph_does_not_read_beyond_the_end_of_a_file(root: Path) -> None:
    _write(root, GRAPH, model(field(5, tensor("model.onnx.data", "8", "9"))))
    with pytest.raises(BundleError, match="reads 17 bytes of 'base/model.onnx.data', which has 16"):
        graph_path(Bundle(root), GRAPH)


def test_the_file_beside_a_graph_is_hashed_before_it_is_read(root: Path) -> None:
    _write(root, GRAPH, model(field(5, tensor("model.onnx.data", "0", "16"))))
    (root / "base/model.onnx.data").write_bytes(b"0" * 16)
    with pytest.raises(FileDamaged, match="'base/model.onnx.data' has sha256"):
        graph_path(Bundle(root), GRAPH)
