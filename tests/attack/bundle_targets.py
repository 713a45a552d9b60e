"""Targets of a bundle: each of its files, damaged in bytes, in fields and in meaning."""

from __future__ import annotations

import random
from pathlib import Path

from edgecompose.bundle.files import read_manifest
from edgecompose.bundle.manifest import MANIFEST_FILE
from tests.attack.mutations import mutate_json_text, write_text
from tests.attack.target import Target
from tests.factories import write_bundle


def _prepare_manifest(folder: Path) -> None:
    write_bundle(folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.name != MANIFEST_FILE:
            path.rmdir() if path.is_dir() else path.unlink()


def _mutate_manifest(rng: random.Random, folder: Path) -> None:
    path = folder / MANIFEST_FILE
    write_text(path, mutate_json_text(rng, path.read_text(encoding="utf-8")))


def _attempt_manifest(folder: Path) -> str:
    read_manifest(folder)
    return "accepted"


TARGETS = (Target("manifest", "cheap", _prepare_manifest, _mutate_manifest, _attempt_manifest),)
