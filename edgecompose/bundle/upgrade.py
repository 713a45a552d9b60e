"""Converts manifests of older schema versions; no other file of a bundle changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgecompose.bundle.atomic import remove_leftovers, write_text
from edgecompose.bundle.files import read_manifest_text
from edgecompose.bundle.lock import lock
from edgecompose.bundle.manifest import MANIFEST_FILE, SCHEMA_VERSION, manifest_from_json, manifest_to_json
from edgecompose.errors import ManifestInvalid
from edgecompose.guard.filesystem import naming

#: Version 4 -> 5: names of settings, by the group that they belong to now.
_RETRIEVAL = {
    "neighbours": "neighbours",
    "temperature": "routing_temperature",
    "nucleus": "nucleus",
    "size_correction": "class_size_exponent",
    "shortcut": "shortcut",
    "fallback": "fallback",
}
_MERGE = {
    "method": "method",
    "density": "density",
    "majority_sign": "majority_sign",
    "rank": "rank",
    "energy": "energy",
    "seed": "dare_seed",
    "norm_guard": "norm_guard",
}


def upgrade_bundle(root: Path) -> bool:
    """Convert the manifest of a bundle to the present schema, in place and atomically.

    Returns:
        False where it had that schema already.

    Raises:
        ManifestInvalid: no manifest, or one that breaks the contract of its version.
        UnsupportedSchema: a version that is too old or too new.
        InUse: another process is changing the bundle.
        OSError: it cannot be written.
    """
    read_manifest_text(root)  # before anything is made beside what is no bundle
    with naming(root), lock(root) as held:
        if held:
            remove_leftovers(root / MANIFEST_FILE)
        return _upgrade(root)


def _upgrade(root: Path) -> bool:
    text = read_manifest_text(root)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"bundle '{root}': {MANIFEST_FILE} is not JSON ({error}); export it again") from error
    if not isinstance(fields, dict) or fields.get("schema_version") != 4:
        manifest_from_json(text)
        return False
    try:
        fields = _from_4(fields)
    except (AttributeError, KeyError, TypeError) as error:
        raise ManifestInvalid(f"bundle '{root}' breaks schema version 4 ({error!r:.80}); export it again") from error
    write_text(root / MANIFEST_FILE, manifest_to_json(manifest_from_json(json.dumps(fields))))
    return True


def _from_4(fields: dict[str, Any]) -> dict[str, Any]:
    """Version 4 as version 5: settings in groups, and the field's words."""
    defaults = dict(fields["defaults"])
    groups = {
        group: {new: defaults.pop(old) for old, new in names.items() if old in defaults}
        for group, names in (("retrieval", _RETRIEVAL), ("merge", _MERGE))
    }
    adapters = {name: _renamed(adapter, admission="validation") for name, adapter in fields["adapters"].items()}
    for adapter in adapters.values():
        if adapter.get("validation") is not None and adapter["validation"].get("verdict") == "harms":
            adapter["validation"] = {**adapter["validation"], "verdict": "hurts"}
    base = _renamed(fields["base"], folding="fusing")
    if base.get("fusing") is not None:
        base["fusing"] = _renamed(base["fusing"], fold_graph="fuse_graph")
    changes = {"schema_version": SCHEMA_VERSION, "defaults": {**defaults, **groups}, "adapters": adapters, "base": base}
    return {**fields, **changes}


def _renamed(fields: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in fields.items()}
