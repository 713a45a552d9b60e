"""A bundle of schema version 4 is refused with the command that converts it, and the command works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgecompose.bundle.files import read_manifest, verify
from edgecompose.bundle.manifest import MANIFEST_FILE, manifest_to_json
from edgecompose.bundle.upgrade import upgrade_bundle
from edgecompose.errors import ManifestInvalid, UnsupportedSchema
from tests.factories import write_bundle


def as_version_4(fields: dict[str, Any]) -> dict[str, Any]:
    """A manifest as edgecompose wrote it before: settings in one row, and other words."""
    retrieval, merge = fields["defaults"].pop("retrieval"), fields["defaults"].pop("merge")
    del retrieval["min_resemblance"]  # of which version 4 had none
    fields["defaults"] |= {
        **retrieval,
        **merge,
        "temperature": retrieval["routing_temperature"],
        "size_correction": retrieval["class_size_exponent"],
        "seed": merge["dare_seed"],
    }
    for name in ("routing_temperature", "class_size_exponent", "dare_seed"):
        del fields["defaults"][name]
    fields["base"]["folding"] = fields["base"].pop("fusing")
    if fields["base"]["folding"] is not None:
        fields["base"]["folding"]["fuse_graph"] = fields["base"]["folding"].pop("fuse_graph")
    for adapter in fields["adapters"].values():
        adapter["admission"] = adapter.pop("validation")
        if adapter["admission"] is not None and adapter["admission"]["verdict"] == "hurts":
            adapter["admission"]["verdict"] = "harms"
    return {**fields, "schema_version": 4}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_bundle(tmp_path)
    path = tmp_path / MANIFEST_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    ci95 = {"examples": 30, "base": 0.5, "accuracy": 0.4, "ci95": [-0.2, -0.1]}
    fields["adapters"]["one"]["validation"] = {"verdict": "hurts", **ci95}
    fields["defaults"]["retrieval"] |= {"routing_temperature": 0.1, "class_size_exponent": 0.5}
    fields["defaults"]["merge"] |= {"method": "dare_ties", "dare_seed": 7}
    path.write_text(json.dumps(fields), encoding="utf-8")
    return tmp_path


def test_an_old_bundle_is_refused_with_the_command_that_converts_it(root: Path) -> None:
    path, manifest = root / MANIFEST_FILE, read_manifest(root)
    path.write_text(json.dumps(as_version_4(json.loads(manifest_to_json(manifest)))), encoding="utf-8")
    with pytest.raises(UnsupportedSchema, match=f"schema version 4, expected 5; .* edgecompose bundle upgrade {root}"):
        read_manifest(root)
    assert upgrade_bundle(root)
    assert read_manifest(root) == manifest
    assert verify(root) == []
    assert not upgrade_bundle(root)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema_version": 3}', '{"schema_version": 4}', '{"schema_version": 4, "defaults": 1}']
)
def test_what_is_no_bundle_of_that_version_is_left_as_it_is(root: Path, content: str) -> None:
    path = root / MANIFEST_FILE
    path.write_text(content, encoding="utf-8")
    with pytest.raises((ManifestInvalid, UnsupportedSchema)):
        upgrade_bundle(root)
    assert path.read_text(encoding="utf-8") == content
    assert [p.name for p in root.iterdir() if "tmp" in p.name] == []
