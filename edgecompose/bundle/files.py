"""A bundle directory on disk: reading its manifest, and checking its files before anything uses them."""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from edgecompose.bundle.atomic import write_text
from edgecompose.bundle.lock import INNER_LOCK
from edgecompose.bundle.manifest import MANIFEST_FILE, Manifest, check_path, manifest_from_json, manifest_to_json
from edgecompose.bundle.records import named
from edgecompose.bundle.specs import FileEntry
from edgecompose.errors import FileDamaged, ManifestInvalid, UnknownAdapter, UnsupportedSchema
from edgecompose.guard.filesystem import read_plain, sync

_CHUNK = 1 << 20
_MANIFEST_LIMIT = 64 << 20
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
#: The largest data file of a graph that is read into memory: while a session is opened, it takes that much twice.
_LARGEST_IN_MEMORY = 512 << 20


class Bundle:
    """An opened bundle: its manifest is valid and every file has the size that the manifest says.

    `path` hashes a file on its first call, so native code never reads unchecked bytes. Files of adapters are opened
    with the bundle, as many as the system allows, so that one that is loaded later is still this bundle's where another
    was put in its place, or where it was removed.

    Args:
        in_memory: for programs that run for long: tensors of graphs are read into memory, where they would be mapped
            else, and whoever writes over their file would end this process. Those of large graphs are mapped still.
    """

    def __init__(self, root: Path, *, in_memory: bool = False) -> None:
        self.root, self._in_memory = root, in_memory
        self.manifest = read_manifest(root)
        for relative, entry in self.manifest.files.items():
            problem = _size_problem(root, relative, entry)
            if problem is not None:
                raise FileDamaged(f"bundle '{root}': {problem}; copy or export the bundle again")
        self._checked: set[str] = set()
        self._opened = _identity(root)
        self._descriptors = _open_files(root, [adapter.file for adapter in self.manifest.adapters.values()])
        weakref.finalize(self, _close_files, tuple(self._descriptors.values()))

    @property
    def changed(self) -> bool:
        """Whether the bundle on disk is another one than was opened, by the identity of its manifest."""
        return _identity(self.root) != self._opened

    def path(self, relative: str) -> Path:
        """Path of one file whose hash has been checked; graphs have files beside them, see `engine.graph_file`.

        Raises:
            FileDamaged: the bytes are not those that the manifest was written for.
        """
        if relative not in self._checked:
            problem = file_problem(self.root, relative, self.manifest.files[relative])
            if problem is not None:
                raise FileDamaged(f"bundle '{self.root}': {problem}; copy or export the bundle again")
            self._checked.add(relative)
        return self.root / relative

    def content(self, relative: str) -> bytes:
        """The bytes of one file, whose hash has been checked.

        Raises:
            FileDamaged: they are not those that the manifest was written for.
        """
        entry, descriptor = self.manifest.files[relative], self._descriptors.get(relative)
        try:
            content = _read_file(self.root / relative if descriptor is None else descriptor, entry.bytes + 1)
        except OSError as error:
            raise FileDamaged(
                f"bundle '{self.root}': file '{relative}' cannot be read: {error}; copy or export the bundle again"
            ) from error
        problem = _content_problem(relative, len(content), hashlib.sha256(content).hexdigest(), entry)
        if problem is not None:
            raise FileDamaged(f"bundle '{self.root}': {problem}; copy or export the bundle again")
        return content

    def graph_data(self, graph: str) -> dict[str, bytes]:
        """The data file of a graph, by its name beside it, where this bundle is one that is read into memory.

        Raises:
            FileDamaged: the file is another one.
        """
        entry = self.manifest.files.get(f"{graph}.data")
        if not self._in_memory or entry is None or entry.bytes > _LARGEST_IN_MEMORY:
            return {}
        return {Path(f"{graph}.data").name: self.content(f"{graph}.data")}

    def adapter_content(self, name: str) -> bytes:
        """The checked bytes of one adapter.

        Raises:
            UnknownAdapter: the bundle has no adapter of that name.
            FileDamaged: the file is another one.
        """
        if name not in self.manifest.adapters:
            known = ", ".join(sorted(self.manifest.adapters)) or "none"
            raise UnknownAdapter(f"adapter '{name}' is not in the bundle; it has: {known}")
        return self.content(self.manifest.adapters[name].file)

    def text(self, relative: str) -> str:
        """Content of one checked UTF-8 file."""
        try:
            return self.path(relative).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FileDamaged(
                f"bundle '{self.root}': file '{relative}' is not UTF-8; export the bundle again"
            ) from error


def read_manifest(root: Path) -> Manifest:
    """The manifest of the bundle at `root`.

    Raises:
        ManifestInvalid: no such directory, no manifest, or one that breaks its contract.
        UnsupportedSchema: written by another major version.
    """
    text = read_manifest_text(root)
    try:
        return manifest_from_json(text)
    except UnsupportedSchema as error:
        raise UnsupportedSchema(str(error).replace("upgrade BUNDLE", f"upgrade {root}")) from error


def read_manifest_text(root: Path) -> str:
    """The text of `manifest.json` of the bundle at `root`.

    Raises:
        ManifestInvalid: no such directory, no manifest, or one that is too large or no UTF-8.
    """
    if not root.is_dir():
        raise ManifestInvalid(f"bundle '{root}' is not a directory; give the directory that holds {MANIFEST_FILE}")
    if not os.path.lexists(root / MANIFEST_FILE):
        raise ManifestInvalid(f"bundle '{root}' has no {MANIFEST_FILE}; is it an edgecompose bundle?")
    problem, _ = _place_problem(root, MANIFEST_FILE)
    if problem is not None:
        raise ManifestInvalid(f"bundle '{root}' cannot be read: {problem}; copy or export the bundle again")
    try:
        content = read_plain(root / MANIFEST_FILE, _MANIFEST_LIMIT)
        if len(content) > _MANIFEST_LIMIT:
            raise ManifestInvalid(f"bundle '{root}': {MANIFEST_FILE} is larger than {_MANIFEST_LIMIT >> 20} MiB")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestInvalid(f"bundle '{root}': {MANIFEST_FILE} cannot be read: {error!s:.300}") from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest.json` in one rename, when every file that it names is on disk.

    Raises:
        OSError: it cannot be written, or a file is missing.
    """
    for relative in manifest.files:
        sync(root / relative)
    write_text(root / MANIFEST_FILE, manifest_to_json(manifest))


def verify(root: Path, *, advance: Callable[[int], None] = lambda count: None) -> list[str]:
    """Every fault of the bundle at `root`, an empty list when there is none.

    Args:
        advance: called with the bytes that were hashed, as they are.

    Raises:
        ManifestInvalid, UnsupportedSchema: the manifest itself cannot be used.
    """
    manifest = read_manifest(root)
    problems = []
    for relative, entry in sorted(manifest.files.items()):
        problem = file_problem(root, relative, entry, advance=advance)
        if problem is not None:
            problems.append(problem)
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir() or p.is_symlink()}
    extra = sorted(present - set(manifest.files) - {MANIFEST_FILE, INNER_LOCK})
    problems += [f"file '{name}' is not in the manifest; remove it" for name in extra]
    return problems


def file_problem(
    root: Path, relative: str, entry: FileEntry, *, advance: Callable[[int], None] = lambda count: None
) -> str | None:
    """What is wrong with one file (place, size, hash), None when nothing is."""
    problem = _size_problem(root, relative, entry)
    if problem is not None:
        return problem
    return _content_problem(relative, entry.bytes, sha256_of(root / relative, advance=advance), entry)


def _content_problem(relative: str, size: int, digest: str, entry: FileEntry) -> str | None:
    if size != entry.bytes:
        return f"file '{relative}' has {size} bytes, the manifest says {entry.bytes}"
    if digest != entry.sha256:
        return f"file '{relative}' has sha256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…"
    return None


def describe_file(path: Path) -> FileEntry:
    """Hash and size of a file, as in the manifest."""
    return FileEntry(sha256_of(path), path.stat().st_size)


def sha256_of(path: Path, *, advance: Callable[[int], None] = lambda count: None) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _open_files(root: Path, names: Sequence[str]) -> dict[str, int]:
    """Descriptors of files, of no more than a quarter of those that this process may have."""
    if os.name == "nt":  # where an open file can neither be replaced nor removed
        return {}
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = len(names) if limit == resource.RLIM_INFINITY else limit // 4
    descriptors: dict[str, int] = {}
    with suppress(OSError):  # other files of this process may take the rest
        for name in names[:most]:
            descriptors[name] = os.open(root / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return descriptors


def _close_files(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)


def _read_file(source: Path | int, size: int) -> bytes:
    """The first bytes of a file; of a descriptor without moving it, since threads share that."""
    if isinstance(source, Path):
        with source.open("rb") as stream:
            return stream.read(size)
    content = bytearray()
    while len(content) < size and (part := os.pread(source, size - len(content), len(content))):
        content += part
    return bytes(content)


def _identity(root: Path) -> tuple[int, ...] | None:
    """What changes when a manifest is replaced or written; None where there is none."""
    try:
        status = (root / MANIFEST_FILE).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _size_problem(root: Path, relative: str, entry: FileEntry) -> str | None:
    problem, size = _place_problem(root, check_path(relative))
    if problem is None and size != entry.bytes:
        return f"file '{relative}' has {size} bytes, the manifest says {entry.bytes}"
    return problem


def _place_problem(root: Path, relative: str) -> tuple[str | None, int]:
    """What is wrong with where a file lies, or with what it is; and its size in bytes."""
    path = root / relative
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            return f"file '{relative}' is a link that leaves the bundle", 0
        status = path.stat()
    except FileNotFoundError:
        return f"file '{relative}' is missing", 0
    except (OSError, RuntimeError, ValueError) as error:  # no such name can be; links in a circle (RuntimeError)
        return f"file '{named(relative)}' cannot be read: {error!s:.200}", 0
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        return f"file '{relative}' is {_KINDS.get(kind, 'no plain file')}, expected a plain file", 0
    return None, status.st_size
