"""Copies of a bundle that share its files."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from edgecompose.bundle.files import read_manifest, write_manifest
from edgecompose.bundle.manifest import MANIFEST_FILE


def without_end_tokens(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle whose base has no end token: every answer is as long as it may be.

    Args:
        folder: a new one. Its files are those of the bundle, linked where the file system can.
    """

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copy(source, target)

    shutil.copytree(bundle, folder, copy_function=link)
    manifest = read_manifest(bundle)
    (folder / MANIFEST_FILE).unlink()  # else the manifest of the bundle itself might be written
    write_manifest(folder, replace(manifest, base=replace(manifest.base, end_tokens=())))
    return folder
