"""Checks of every download: free space on the disk, and the sha256 of the result."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from edgecompose.bundle.files import sha256_of
from edgecompose.errors import ExportError
from edgecompose_export.fetch.models import KnownModel

#: Called with the name of a step, and how much of how much of it is done.
Advance = Callable[[str, float, float], None]
CHUNK = 1 << 20


def folder_sha256(folder: Path) -> str:
    """The sha256 of the output of `sha256sum` for all files of a folder, sorted by path: names and content."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    listing = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(listing.encode()).hexdigest()


def require_space(output: Path, needed: int) -> None:
    """Refuse to fill the disk of `output` with `needed` bytes that are not free."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(
            f"the disk of '{output}' has {free / 1e6:.0f} MB free, fetching takes up to {needed / 1e6:.0f} MB; free "
            "some, or give a folder on another disk"
        )


def require_sha256(model: KnownModel, digest: str, downloads: Path) -> None:
    """Refuse a download with the sha256 `digest` that is not that of the model."""
    if digest != model.sha256:
        raise ExportError(
            f"the download of {model.name} has sha256 {digest[:12]}…, expected {model.sha256[:12]}…; delete "
            f"'{downloads}' and run the same command again"
        )


def partial_path(target: Path) -> Path:
    """The name of a file while it is written."""
    return target.with_name(f"{target.name}.part")
