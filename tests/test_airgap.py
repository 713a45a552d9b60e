"""The archive of `make airgap` installs and answers without a network; nothing that was altered is installed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from edgecompose import __version__
from tests.network import without_network

ROOT = Path(__file__).parents[1]
NAME = f"edgecompose-{__version__}-airgap-{platform.system().lower()}-{platform.machine()}"
ARCHIVE = ROOT / f"dist/{NAME}.tar.gz"
PROMPT = "Customer review of a business: Great soup.\nPositive or negative?\nAnswer:"
#: Where no proxy listens.
CLOSED = "http://127.0.0.1:9"
built = pytest.mark.skipif(not ARCHIVE.is_file(), reason=f"dist/{ARCHIVE.name} is not built; run 'make airgap'")
pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("airgap")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture
def altered(unpacked: Path, tmp_path: Path) -> Path:
    """A copy whose files may be replaced, not written to."""
    shutil.copytree(unpacked, tmp_path / NAME, copy_function=os.link, symlinks=True)
    return tmp_path / NAME


def call(*command: object, home: Path, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    """Run a program without a network; where the machine cannot do that, with none that pip could find."""
    prefix = without_network()
    environment = {"HOME": str(home), "PATH": path}
    if prefix is None:
        print("unshare -rn fails here: the network is held off by PIP_NO_INDEX and a closed proxy only")
        environment |= {"PIP_NO_INDEX": "1", "HTTP_PROXY": CLOSED, "HTTPS_PROXY": CLOSED, "ALL_PROXY": CLOSED}
    return subprocess.run(
        [*(prefix or []), *map(str, command)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        cwd=home,
        check=False,
        timeout=300,
    )


def faults(done: subprocess.CompletedProcess[str]) -> str:
    """What an installation that failed on purpose says."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    return done.stderr


@built
def test_the_executable_and_the_package_answer_and_nothing_stays_behind(unpacked: Path, home: Path) -> None:
    python = Path(sys.executable)
    done = call("sh", unpacked / "install.sh", "--python", python, home=home)
    assert done.returncode == 0, done.stderr
    link, prefix = home / ".local/bin/edgecompose", home / ".local/share/edgecompose"
    assert f"{prefix}/bin/edgecompose run {prefix}/bundle" in done.stdout
    assert link.resolve() == prefix / "bin/edgecompose"
    answers = []
    for command in (link, prefix / "venv/bin/edgecompose"):
        ran = call(command, "run", prefix / "bundle", PROMPT, "--max-tokens", 4, "--json", home=home, path="")
        assert (ran.returncode, ran.stderr) == (0, "")
        answers.append(json.loads(ran.stdout))
    assert answers[0]["answer"] and answers[0]["neighbours"]
    assert all(answers[0][key] == answers[1][key] for key in ("answer", "composition", "weights"))
    assert call(link, "verify", prefix / "bundle", home=home).returncode == 0
    assert call("sh", prefix / "install.sh", "--uninstall", home=home).returncode == 0
    assert [path for path in home.rglob("*") if not path.is_dir()] == []
    assert not prefix.exists()


@built
@pytest.mark.parametrize("name", ["bundle/manifest.json", "bin/edgecompose", "install.sh"])
def test_a_changed_byte_is_refused_before_anything_is_installed(altered: Path, home: Path, name: str) -> None:
    path = altered / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if name == "install.sh":
        content = bytearray(path.read_bytes() + b"#")
    path.unlink()
    path.write_bytes(content)
    assert f"{name} differs from SHA256SUMS" in faults(call("sh", altered / "install.sh", home=home))
    assert list(home.iterdir()) == []


@built
def test_what_is_missing_or_was_added_is_refused(altered: Path, home: Path) -> None:
    (altered / "bin/more").write_text("", encoding="utf-8")
    assert "bin/more is not listed in SHA256SUMS" in faults(call("sh", altered / "install.sh", home=home))
    (altered / "bin/more").unlink()
    (altered / "bundle/manifest.json").unlink()
    message = faults(call("sh", altered / "install.sh", home=home))
    assert "bundle/manifest.json differs from SHA256SUMS or is missing" in message
    assert list(home.iterdir()) == []


@built
def test_an_installation_is_replaced_only_when_forced_and_survives_a_failure(altered: Path, home: Path) -> None:
    prefix = home / "my apps"
    install = ("sh", altered / "install.sh", "--prefix", prefix)
    done = call(*install, home=home)
    assert done.returncode == 0, done.stderr
    assert f"'{prefix}/bin/edgecompose' run '{prefix}/bundle'" in done.stdout
    assert [path.name for path in home.iterdir()] == [prefix.name], "an own prefix needs no link"
    assert "add --force" in faults(call(*install, home=home))
    (wheel,) = (altered / "wheels").glob("numpy-*")
    wheel.unlink()
    sums = altered / "SHA256SUMS"
    lines = [line for line in sums.read_text(encoding="utf-8").splitlines(True) if wheel.name not in line]
    sums.unlink()
    sums.write_text("".join(lines), encoding="utf-8")
    (prefix / "mine").write_text("kept", encoding="utf-8")
    before = {path: path.lstat().st_mtime_ns for path in prefix.rglob("*") if not path.is_dir()}
    failed = call(*install, "--force", "--python", sys.executable, home=home)
    assert "installing the packages failed" in faults(failed) and "all is as it was" in failed.stderr
    assert {path: path.lstat().st_mtime_ns for path in prefix.rglob("*") if not path.is_dir()} == before
    missing = home / "deep" / "er"
    failed = call("sh", altered / "install.sh", "--prefix", missing, "--python", sys.executable, home=home)
    assert "installing the packages failed" in faults(failed)
    assert not missing.parent.exists()
    assert call(*install, "--force", home=home).returncode == 0
    assert call(prefix / "bin/edgecompose", "doctor", home=home).returncode == 0
    removed = call("sh", altered / "install.sh", "--uninstall", "--prefix", prefix, home=home)
    assert (removed.returncode, [path.name for path in prefix.iterdir()]) == (0, ["mine"])


@built
def test_what_is_not_ours_is_left_alone(unpacked: Path, home: Path) -> None:
    install = ("sh", unpacked / "install.sh")
    (home / "full").mkdir()
    (home / "full/file").touch()
    for options in ((), ("--force",)):
        message = faults(call(*install, "--prefix", home / "full", *options, home=home))
        assert "holds files that are not EdgeCompose's" in message
    assert "holds no installation" in faults(call(*install, "--uninstall", "--prefix", home / "full", home=home))
    (home / ".local/bin").mkdir(parents=True)
    (home / ".local/bin/edgecompose").touch()
    assert "is another program's" in faults(call(*install, "--force", home=home))
    assert "is no Python that runs" in faults(call(*install, "--python", home / "absent", home=home))
    assert call(*install, "--unknown", home=home).returncode == 2
    assert sorted(path.name for path in home.rglob("*")) == [".local", "bin", "edgecompose", "file", "full"]


@pytest.mark.parametrize("place", ["link", "file", "link/below", "file/below", "absent"])
def test_nothing_that_was_there_is_removed_by_a_failure(tmp_path: Path, home: Path, place: str) -> None:
    """Our script with an executable that does not run; a link to nothing, a file, and paths through them."""
    archive, kept = tmp_path / "archive", tmp_path / "kept"
    for folder in (archive / "bin", archive / "bundle", kept):
        folder.mkdir(parents=True)
    text = (ROOT / "packaging/install.sh").read_text(encoding="utf-8")
    platform_name = f"{platform.system().lower()}-{platform.machine()}"
    (archive / "install.sh").write_text(text.replace("@platform@", platform_name), encoding="utf-8")
    (archive / "bin/edgecompose").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (archive / "bin/edgecompose").chmod(0o755)
    (archive / "README.txt").touch()
    names = ("README.txt", "bin/edgecompose", "install.sh")
    sums = (f"{hashlib.sha256((archive / name).read_bytes()).hexdigest()}  ./{name}\n" for name in names)
    (archive / "SHA256SUMS").write_text("".join(sums).replace("./", ""), encoding="utf-8")
    (kept / "link").symlink_to("nowhere/at/all")
    (kept / "file").write_text("mine", encoding="utf-8")
    message = faults(call("sh", archive / "install.sh", "--prefix", kept / place, home=home))
    assert ("the executable does not run here" if place == "absent" else "is not a directory") in message
    assert sorted(path.name for path in kept.iterdir()) == ["file", "link"]
    assert ((kept / "link").readlink(), (kept / "file").read_text(encoding="utf-8")) == (Path("nowhere/at/all"), "mine")


@built
def test_the_archive_lists_all_that_it_holds(unpacked: Path) -> None:
    hash_of_all, name = (ARCHIVE.parent / f"{ARCHIVE.name}.sha256").read_text(encoding="utf-8").split()
    with ARCHIVE.open("rb") as content:
        assert (hashlib.file_digest(content, "sha256").hexdigest(), ARCHIVE.name) == (hash_of_all, name)
    listed = {line.split("  ")[1] for line in (unpacked / "SHA256SUMS").read_text(encoding="utf-8").splitlines()}
    present = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if not path.is_dir()}
    assert listed == present - {"SHA256SUMS"}
    assert {name.split("/")[0] for name in listed} == {"wheels", "bundle", "bin", "install.sh", "README.txt"}
    assert "@" not in (unpacked / "README.txt").read_text(encoding="utf-8")
    wheels = {path.name.split("-")[0].lower() for path in (unpacked / "wheels").iterdir()}
    assert {"edgecompose", "numpy", "onnxruntime", "uvicorn", "gguf"} <= wheels
    assert not wheels & {"torch", "transformers", "peft", "onnx", "matplotlib"}


def pack(folder: Path, output: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "packaging/airgap.py"
    options = [f"--{name}={folder / name}" for name in ("executable", "wheels", "bundle")]
    command = [sys.executable, str(script), *options, "--extras=cpu", "-o", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_same_input_gives_the_same_bytes_and_a_faulty_bundle_none(tmp_path: Path) -> None:
    for name, content in (
        ("executable/edgecompose", "#!/bin/sh\n[ -f \"$2/whole\" ] || { echo 'a fault'; exit 1; }\n"),
        ("wheels/edgecompose-1.2-py3-none-any.whl", "wheel"),
        ("bundle/manifest.json", '{"name": "tiny"}'),
        ("bundle/whole", ""),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    (tmp_path / "executable/edgecompose").chmod(0o755)
    (tmp_path / "executable/link").symlink_to("edgecompose")
    one, other = tmp_path / "one" / "x.tar.gz", tmp_path / "other" / "x.tar.gz"
    done = pack(tmp_path, one)
    assert done.returncode == 0 and "MB  bundle" in done.stdout and "hashing" in done.stderr
    os.utime(tmp_path / "bundle/whole", (1, 1))
    assert pack(tmp_path, other).returncode == 0
    assert one.read_bytes() == other.read_bytes()
    with tarfile.open(one) as archive:
        members = {member.name: member for member in archive.getmembers()}
    assert list(members) == sorted(members)
    assert members["x/bin/edgecompose"].mode == 0o755 and members["x/bin/link"].linkname == "edgecompose"
    (tmp_path / "bundle/whole").unlink()
    done = pack(tmp_path, tmp_path / "third" / "x.tar.gz")
    assert (done.returncode, done.stdout) == (1, "") and "has faults, build it again: a fault" in done.stderr
    assert not (tmp_path / "third").exists()
