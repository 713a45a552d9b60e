"""Models on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from edgecompose.bundle.files import sha256_of
from edgecompose.errors import ExportError
from edgecompose_export.fetch.checks import Advance, require_sha256, require_space
from edgecompose_export.fetch.models import HubFile, KnownModel


def fetch_from_hub(model: KnownModel, source: HubFile, output: Path, *, target: Path, advance: Advance) -> None:
    """Download a file of the hub into `output/hub`, and move it to `target`."""
    os.environ["HF_HUB_OFFLINE"] = "0"  # the package reads it on import; every other command stays offline
    from huggingface_hub import hf_hub_download

    downloads = output / "hub" / model.name
    require_space(output, model.bytes)
    advance(f"downloading {source.repository}/{source.file}", 0, 1)
    try:
        path = hf_hub_download(source.repository, source.file, revision=source.revision, local_dir=downloads)
    except Exception as error:  # the package passes on errors of its HTTP client
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"{source.file} of {source.repository} could not be downloaded ({reason}); check the network and run the "
            "same command again, finished downloads remain"
        ) from error
    require_sha256(model, sha256_of(Path(path)), downloads)
    target.parent.mkdir(parents=True, exist_ok=True)
    Path(path).replace(target)
    shutil.rmtree(downloads, ignore_errors=True)
    with contextlib.suppress(OSError):
        downloads.parent.rmdir()
