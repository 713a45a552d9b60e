"""Packs the executable, the wheels and a bundle into one archive that installs where there is no network.

The same input gives the same bytes: names are sorted, times and owners fixed. Progress goes to stderr, sizes to stdout.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import platform
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
#: 1 January 1980, the first day that zip and tar programs take without a remark.
EPOCH = 315532800
#: Level 6 takes a third off the whole, most of it from the executable; 9 takes no more.
LEVEL = 6


def main() -> None:
    """Parse, check, pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executable", type=Path, required=True, help="folder that holds edgecompose and _internal")
    parser.add_argument("--wheels", type=Path, required=True, help="folder of wheels for the Python that runs this")
    parser.add_argument("--extras", required=True, help="extras that the wheels are for, as in cpu,server")
    parser.add_argument("--bundle", type=Path, required=True, help="bundle to ship")
    parser.add_argument("-o", "--output", type=Path, required=True, help="archive to write, NAME.tar.gz")
    options = parser.parse_args()
    try:
        pack(options.executable, options.wheels, options.extras, options.bundle.resolve(), options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"airgap.py: {error}")


def pack(executable: Path, wheels: Path, extras: str, bundle: Path, output: Path) -> None:
    """Write the archive, and its hash in `output`.sha256.

    Raises:
        ValueError: the bundle is not as its manifest says, or the wheels are not those of one version.
        OSError: something cannot be read or written.
    """
    _say(f"checking the bundle {bundle.name}")
    command = executable / "edgecompose"
    checked = subprocess.run([command, "verify", bundle], capture_output=True, text=True, check=False)
    if checked.returncode:
        faults = (checked.stdout + checked.stderr).strip()
        raise ValueError(f"the bundle '{bundle}' has faults, build it again: {faults}")
    own = sorted(wheels.glob("edgecompose-*.whl"))
    if len(own) != 1:
        raise ValueError(f"'{wheels}' holds {len(own)} wheels of edgecompose, one is wanted; remove it and run again")
    words = {
        "version": own[0].name.split("-")[1],
        "platform": f"{platform.system()}-{platform.machine()}".lower(),
        "glibc": _glibc(executable),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "extras": extras,
        "bundle": json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["name"],
    }
    words["rule"] = "=" * len(f"EdgeCompose {words['version']} for machines without a network")
    files: dict[str, Path | bytes] = {
        "install.sh": _filled("install.sh", words),
        "README.txt": _filled("airgap-readme.txt", words),
    }
    parts = {"wheels": wheels, "bundle": bundle, "bin": executable}
    for name, folder in parts.items():
        files |= {f"{name}/{path.relative_to(folder).as_posix()}": path for path in _files(folder)}
    _say(f"hashing {len(files)} files")
    sums = "".join(f"{_sha256(files[name])}  {name}\n" for name in sorted(files))
    partial = output.with_name(f"{output.name}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(partial, output.name.removesuffix(".tar.gz"), {**files, "SHA256SUMS": sums.encode()})
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    output.with_name(f"{output.name}.sha256").write_text(f"{_sha256(output)}  {output.name}\n", encoding="utf-8")
    for name, folder in parts.items():
        size = sum(path.stat().st_size for path in _files(folder) if not path.is_symlink())
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{output.stat().st_size / 1e6:8.1f} MB  {output}")


def _write(path: Path, root: str, files: Mapping[str, Path | bytes]) -> None:
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", LEVEL, raw, mtime=EPOCH) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for count, name in enumerate(sorted(files), 1):
            _say(f"packing {count} of {len(files)} files", passing=True)
            source = files[name]
            entry = tarfile.TarInfo(f"{root}/{name}")
            entry.mtime, entry.mode = EPOCH, 0o644
            if isinstance(source, bytes):
                entry.size = len(source)
                archive.addfile(entry, io.BytesIO(source))
            elif source.is_symlink():
                entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, str(source.readlink()), 0o777
                archive.addfile(entry)
            else:
                entry.size = source.stat().st_size
                entry.mode = 0o755 if source.stat().st_mode & 0o100 else 0o644
                with source.open("rb") as content:
                    archive.addfile(entry, content)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if not path.is_dir())


def _filled(name: str, words: Mapping[str, str]) -> bytes:
    text = (HERE / name).read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    return text.encode()


def _sha256(source: Path | bytes) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _glibc(folder: Path) -> str:
    """The newest version of the C library that a library or executable in the folder asks for."""
    versions = {match for path in _files(folder) for match in re.findall(rb"\0GLIBC_(\d+)\.(\d+)\b", path.read_bytes())}
    return "{}.{}".format(*max(((int(major), int(minor)) for major, minor in versions), default=(2, 17)))


def _say(text: str, *, passing: bool = False) -> None:
    """Tell what happens; `passing` news only where somebody looks."""
    if not passing or sys.stderr.isatty():
        print(f"== {text}", file=sys.stderr, end="\r" if passing else "\n", flush=True)


if __name__ == "__main__":
    main()
