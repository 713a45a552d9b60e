"""A bundle on disk: every kind of damage is found before anything uses the file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecompose.bundle.files import Bundle, describe_file, read_manifest, verify
from edgecompose.bundle.manifest import MANIFEST_FILE, manifest_to_json
from edgecompose.errors import BundleError, FileDamaged, ManifestInvalid, UnknownAdapter
from edgecompose.guard.filesystem import read_plain
from tests.factories import write_bundle

GRAPH, OTHER = "base/model.onnx", "embedder/model.onnx"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    write_bundle(folder)
    return folder


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def _swap(one: Path, other: Path) -> None:
    remaining = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(remaining)


def _link_out(path: Path) -> None:
    """The same bytes, but outside of the bundle."""
    outside = path.parents[2] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _add_to_manifest(root: Path, name: str) -> None:
    manifest = read_manifest(root)
    manifest = dataclasses.replace(manifest, files=manifest.files | {name: describe_file(root / name)})
    (root / MANIFEST_FILE).write_text(manifest_to_json(manifest), encoding="utf-8")


def test_a_sound_bundle_opens_and_has_no_fault(root: Path) -> None:
    bundle = Bundle(root)
    assert bundle.manifest.name == "test"
    assert bundle.path(GRAPH) == root / GRAPH
    assert bundle.adapter_content("two") == (root / "adapters/two.safetensors").read_bytes()
    assert bundle.text("base/chat.jinja") == (root / "base/chat.jinja").read_text(encoding="utf-8")
    hashed: list[int] = []
    assert verify(root, advance=hashed.append) == []
    assert sum(hashed) == sum(entry.bytes for entry in bundle.manifest.files.values())


def test_an_unknown_adapter_is_named_with_those_that_there_are(root: Path) -> None:
    with pytest.raises(UnknownAdapter, match="'three'.*one, two"):
        Bundle(root).adapter_content("three")


SEEN_AT_ONCE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 15 bytes, the manifest says 16"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() * 2), "has 32 bytes"),
    "a directory": (_make_directory, "is a folder"),
    "a pipe": (_make_pipe, "is a pipe"),
    "a link that leaves": (_link_out, "leaves the bundle"),
    "a link to itself": (_loop, ""),
}


@pytest.mark.parametrize("damage", SEEN_AT_ONCE)
def test_damage_that_shows_without_reading_is_found_on_opening(root: Path, damage: str) -> None:
    harm, message = SEEN_AT_ONCE[damage]
    harm(root / GRAPH)
    with pytest.raises(FileDamaged, match=f"'{GRAPH}'.*{message}"):
        Bundle(root)
    assert any(GRAPH in fault and message in fault for fault in verify(root))


def test_a_flipped_byte_is_found_on_use(root: Path) -> None:
    _flip(root / GRAPH)
    bundle = Bundle(root)
    assert bundle.path(OTHER) == root / OTHER
    with pytest.raises(FileDamaged, match=f"'{GRAPH}' has sha256"):
        bundle.path(GRAPH)
    (fault,) = verify(root)
    assert f"file '{GRAPH}' has sha256" in fault


def test_swapped_files_are_found(root: Path) -> None:
    _swap(root / GRAPH, root / OTHER)
    bundle = Bundle(root)
    for name in (GRAPH, OTHER):
        with pytest.raises(FileDamaged, match=name):
            bundle.path(name)
    assert len(verify(root)) == 2


def test_a_checked_file_is_hashed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(root)
    bundle.path(OTHER)
    monkeypatch.setattr("edgecompose.bundle.files.sha256_of", lambda *args, **kwargs: pytest.fail("hashed again"))
    assert bundle.path(OTHER) == root / OTHER


def test_a_link_inside_the_bundle_is_fine(root: Path) -> None:
    (root / GRAPH).rename(root / "base/real.onnx")
    (root / GRAPH).symlink_to("real.onnx")
    assert Bundle(root).path(GRAPH).read_bytes()
    assert verify(root) == ["file 'base/real.onnx' is not in the manifest; remove it"]


def test_verify_lists_every_fault_at_once(root: Path) -> None:
    (root / "index.usearch").unlink()
    (root / "index.jsonl").write_bytes(b"")
    _flip(root / "adapters/one.safetensors")
    _link_out(root / "base/tokenizer.json")
    (root / "notes.txt").write_text("?", encoding="utf-8")
    (root / "base/folder").mkdir()
    (root / "base/folder/deep").write_text("?", encoding="utf-8")
    (root / "linked").symlink_to(root.parent)
    faults = verify(root)
    for name in (
        "index.usearch",
        "index.jsonl",
        "adapters/one.safetensors",
        "base/tokenizer.json",
        "notes.txt",
        "base/folder/deep",
        "linked",
    ):
        assert sum(f"'{name}'" in fault for fault in faults) == 1, name
    assert len(faults) == 7


def test_a_file_that_is_no_longer_readable_as_text_is_a_bundle_error(root: Path) -> None:
    (root / "base/chat.jinja").write_bytes(b"\xff" * 16)
    _add_to_manifest(root, "base/chat.jinja")
    with pytest.raises(BundleError, match="base/chat.jinja"):
        Bundle(root).text("base/chat.jinja")


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000 + "y", "\ud800x"])
def test_a_name_that_no_file_can_have_is_a_bundle_error(root: Path, name: str) -> None:
    result = json.loads((root / MANIFEST_FILE).read_text(encoding="utf-8"))
    result["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (root / MANIFEST_FILE).write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(BundleError):
        Bundle(root)


def test_an_empty_file_is_a_file(root: Path) -> None:
    (root / "empty").write_bytes(b"")
    _add_to_manifest(root, "empty")
    assert verify(root) == []
    assert Bundle(root).path("empty") == root / "empty"


@pytest.mark.parametrize("use", [Bundle, read_manifest, verify])
def test_a_manifest_that_cannot_be_read_is_an_error_of_ours(root: Path, use: Callable[[Path], object]) -> None:
    manifest = root / MANIFEST_FILE
    whole = manifest.read_bytes()
    for content in (b"", b"\xff\xfe\x00", whole[:-10], whole.replace(b'"name"', b'"nom"')):
        manifest.write_bytes(content)
        with pytest.raises(ManifestInvalid):
            use(root)
    manifest.unlink()
    with pytest.raises(ManifestInvalid, match="has no manifest.json"):
        use(root)
    manifest.mkdir()
    with pytest.raises(ManifestInvalid, match="cannot be read"):
        use(root)


def _link_to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _move_out(path: Path) -> None:
    path.rename(path.parents[1] / "outside")
    path.symlink_to(path.parents[1] / "outside")


UNPLAIN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (_make_pipe, "is a pipe, expected a plain file"),
    "a device": (_link_to_a_device, "leaves the bundle"),
    "a link that leaves": (_move_out, "leaves the bundle"),
    "a link to itself": (_loop, "cannot be read"),
}


@pytest.mark.parametrize("use", [Bundle, read_manifest, verify])
@pytest.mark.parametrize("kind", UNPLAIN)
def test_a_manifest_that_is_no_plain_file_of_the_bundle_is_neither_waited_for_nor_read(
    root: Path, kind: str, use: Callable[[Path], object]
) -> None:
    harm, message = UNPLAIN[kind]
    harm(root / MANIFEST_FILE)
    with pytest.raises(ManifestInvalid, match=message):
        use(root)


def test_a_pipe_in_place_of_a_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no plain file"):
        read_plain(tmp_path / "pipe", 10)
    (tmp_path / "file").write_bytes(b"x" * 20)
    assert read_plain(tmp_path / "file", 10) == b"x" * 11


def test_a_manifest_may_begin_with_a_byte_order_mark(root: Path) -> None:
    content = (root / MANIFEST_FILE).read_bytes()
    (root / MANIFEST_FILE).write_bytes(b"\xef\xbb\xbf" + content)
    assert read_manifest(root).name == "test"


@pytest.mark.parametrize("use", [Bundle, read_manifest, verify])
def test_what_is_not_a_directory_is_no_bundle(root: Path, use: Callable[[Path], object]) -> None:
    for path in (root / MANIFEST_FILE, root / "absent"):
        with pytest.raises(ManifestInvalid, match="not a directory"):
            use(path)


def test_a_manifest_of_absurd_size_is_not_read(root: Path) -> None:
    with (root / MANIFEST_FILE).open("r+b") as stream:
        stream.truncate(65 << 20)  # sparse
    with pytest.raises(ManifestInvalid, match="larger than 64 MiB"):
        read_manifest(root)
