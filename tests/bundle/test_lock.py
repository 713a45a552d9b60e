"""One process at a time writes a file or folder, and a second one learns who the first is."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgecompose.bundle import lock as locks
from edgecompose.bundle.lock import INNER_LOCK, LocksMissing, lock
from edgecompose.errors import InUse

HOLD = "import sys; from pathlib import Path; from edgecompose.bundle.lock import lock\nwith lock(Path(sys.argv[1])): "
WAIT = HOLD + "print('locked', flush=True); sys.stdin.read()"


def hold(path: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process that has the lock of a path."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, str(path), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_process_ends_at_once_and_names_the_first(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with hold(output, "a private prompt") as process:
        with pytest.raises(InUse) as raised, lock(output):
            pass
        message = str(raised.value)
        assert f"'{output}' is being written by process {process.pid} on {socket.gethostname()} since 20" in message
        assert "wait until it ends, or stop it" in message
        assert "private" not in message + next(tmp_path.glob(".out.lock")).read_text(encoding="utf-8")
        process.communicate()
    with lock(output) as held:
        assert held
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    with hold(tmp_path / "out") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    with lock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_names_of_one_folder_are_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    for other in (tmp_path / "link", Path()):
        with lock(tmp_path / "real"), pytest.raises(InUse, match=f"process {os.getpid()} on"), lock(other):
            pass


def test_of_many_threads_one_at_a_time_has_the_lock(tmp_path: Path) -> None:
    """A lock is removed with its file, so one that waits at the removed file must not take it for the lock."""
    inside, entered, wrong = [0], [0], [0]

    def work() -> None:
        for _ in range(60):
            try:
                with lock(tmp_path / "out"):
                    inside[0] += 1
                    wrong[0] += inside[0] != 1
                    entered[0] += 1
                    inside[0] -= 1
            except InUse:
                pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong[0], entered[0] > 0) == (0, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    import fcntl

    def refuse(*arguments: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(LocksMissing, match="file system without locks"), lock(tmp_path / "out") as held:
        assert not held
    assert list(tmp_path.iterdir()) == []


def test_a_lock_lies_inside_where_nothing_can_be_made_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    real = os.open

    def refuse(path: Path, *arguments: int) -> int:
        if Path(path).parent == tmp_path:
            raise PermissionError(errno.EACCES, "no", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with lock(output):
        assert [path.name for path in output.iterdir()] == [INNER_LOCK]
    assert list(output.iterdir()) == []
    with pytest.raises(PermissionError), lock(tmp_path / "absent"):
        pass


def test_what_others_wrote_is_left_alone(tmp_path: Path) -> None:
    mine, output = tmp_path / "mine", tmp_path / "out"
    mine.write_text("notes", encoding="utf-8")
    (tmp_path / ".out.lock").symlink_to(mine)
    with pytest.raises(OSError, match=r"\.out\.lock"), lock(output):
        pass
    (tmp_path / ".out.lock").unlink()
    (tmp_path / ".out.lock").write_text("notes", encoding="utf-8")
    with lock(output):
        pass
    os.mkfifo(tmp_path / ".other.lock")
    with pytest.raises(OSError, match="is no plain file"), lock(tmp_path / "other"):
        pass
    assert mine.read_text(encoding="utf-8") == (tmp_path / ".out.lock").read_text(encoding="utf-8") == "notes"


def test_a_lock_that_a_full_disk_cuts_short_is_removed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:20]))
    with lock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [255, 250, 3])
def test_names_may_be_as_long_as_the_system_allows(tmp_path: Path, length: int) -> None:
    with lock(tmp_path / ("n" * length)):
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/x/bin/edgecompose", "bundle", "add-task", "b"], "edgecompose bundle add-task"),
        (["/x/edgecompose_export/__main__.py", "adapter", "lora"], "edgecompose-export adapter"),
        (["edgecompose", "compose", "demo", "secret"], "edgecompose compose"),
        (["my_program.py", "secret"], "my-program"),
        ([], "python"),
    ],
)
def test_a_lock_names_the_command_and_no_arguments(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], command: str
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    assert locks._command() == command
