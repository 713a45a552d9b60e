"""A valid manifest as JSON, and with other values."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from edgecompose.bundle.manifest import Manifest
from edgecompose.bundle.specs import Distance
from tests.factories import write_bundle

Json = Any
Place = tuple[str | int, ...]


def example(folder: Path) -> Manifest:
    """The manifest of a bundle in a new folder, with a distance."""
    written = write_bundle(folder)
    return dataclasses.replace(written, base=dataclasses.replace(written.base, distance=Distance(0.01, 0.97, 8, 512)))


def at(root: Json, place: Place) -> Json:
    """The value at a place."""
    for key in place:
        root = root[key]
    return root


def changed(root: Json, place: Place, value: Json) -> str:
    """The text of a JSON value with another value at a place."""
    copied = copy.deepcopy(root)
    at(copied, place[:-1])[place[-1]] = value
    return json.dumps(copied)
