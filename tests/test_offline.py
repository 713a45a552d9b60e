"""`edgecompose run` opens no connection and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures_tiny import TASKS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
#: Every attempt is counted and refused, also those whose failure somebody would swallow.
NO_NETWORK = """
import json, socket, sys
attempts = []
def refuse(*arguments, **named):
    attempts.append(repr(arguments))
    raise OSError("the network was asked for")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "create_connection", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, name, refuse)
"""
RUN = """
from edgecompose.cli.main import main
main(sys.argv[1:], standalone_mode=False)
print(json.dumps(attempts))
"""


@pytest.fixture
def empty(tmp_path: Path) -> dict[str, Path]:
    """Folders where a program might leave something: HOME, the temporary folder, the working directory."""
    folders = {name: tmp_path / name for name in ("HOME", "TMPDIR", "cwd")}
    for folder in folders.values():
        folder.mkdir()
    return folders


def run_offline(code: str, *arguments: object, empty: dict[str, Path], prefix: tuple[str, ...] = ()) -> list[str]:
    """Lines that a Python program prints in a fresh environment."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(empty["HOME"]), "TMPDIR": str(empty["TMPDIR"])}
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=empty["cwd"], check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("command", ["run", "retrieve", "inspect", "doctor"])
def test_no_connection_is_tried_and_nothing_is_left(bundle: Path, empty: dict[str, Path], command: str) -> None:
    arguments = {"doctor": (), "inspect": (bundle,)}.get(command, (bundle, TASKS["numbers"][1]))
    *answer, attempts = run_offline(NO_NETWORK + RUN, command, *arguments, "--json", empty=empty)
    assert json.loads(attempts) == []
    assert isinstance(json.loads(answer[0]), dict)
    for name, folder in empty.items():
        assert list(folder.iterdir()) == [], f"something was left in {name}"


def test_the_guard_sees_a_connection(empty: dict[str, Path]) -> None:
    code = """
import urllib.request
try:
    urllib.request.urlopen("http://127.0.0.1:9/")
except OSError:
    print(len(attempts))
"""
    assert run_offline(NO_NETWORK + code, empty=empty) == ["1"]


def test_without_any_network_device(bundle: Path, empty: dict[str, Path]) -> None:
    """Native code is held off too: the process has no network at all."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare (util-linux) is not installed, so a process without a network cannot be started")
    probe = subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this machine does not let us start a process without a network (unshare -rn fails)")
    code = f"import sys, json; attempts = []; {RUN.strip()}".replace("; from", "\nfrom")
    *answer, _ = run_offline(code, "run", bundle, TASKS["numbers"][1], "--json", empty=empty, prefix=(unshare, "-rn"))
    assert json.loads(answer[0])["neighbours"][0]["task"] == "numbers"
    assert all(list(folder.iterdir()) == [] for folder in empty.values())


def test_a_read_only_bundle_is_enough(bundle_copy: Path) -> None:
    """Nothing is written into the bundle either."""
    from click.testing import CliRunner

    from edgecompose.cli.main import main

    before = {path: path.stat().st_mtime_ns for path in bundle_copy.rglob("*")}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    done = CliRunner().invoke(main, ["run", str(bundle_copy), TASKS["colours"][0]])
    assert done.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in bundle_copy.rglob("*")} == before
    for path in before:
        path.chmod(0o755)
