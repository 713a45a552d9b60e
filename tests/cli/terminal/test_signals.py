"""A signal ends a command with 128 plus its number, at any moment, and without a traceback."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.calls import PROMPT
from tests.cli.processes import PATIENCE, Terminal, environment, hear_signals

#: It starts processes; `make check` leaves it out.
pytestmark = pytest.mark.slow

#: Runs a package as a program, and sends itself a signal at one of the events that Python reports to auditors: imports,
#: opened files, and the like. Their number does not depend on the speed of the machine; for moment -1 it is printed.
AT_EVENT = """
import atexit, itertools, os, runpy, sys
number, moment, package, *sys.argv[1:] = [int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]]
events = itertools.count()
counting = False
def see(name, arguments):
    global counting
    counting = counting or arguments[:1] == ("edgecompose.errors",)  # the first that is imported after signals are set
    if counting and next(events) == moment:
        os.kill(os.getpid(), number)
if moment < 0:
    atexit.register(lambda: print(next(events), file=sys.stderr))
sys.addaudithook(see)
runpy.run_module(package, run_name="__main__", alter_sys=True)
"""


def at_event(number: int, moment: int, package: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", AT_EVENT, str(int(number)), str(moment), package, *map(str, arguments)]
    return subprocess.run(
        line, capture_output=True, text=True, env=environment(), preexec_fn=hear_signals, check=False, timeout=PATIENCE
    )


def moments(count: int, package: str, *arguments: object) -> list[int]:
    """Some moments of a command, the first and one that is near its end among them."""
    total = int(at_event(0, -1, package, *arguments).stderr.splitlines()[-1])
    return [0, *random.Random(0).sample(range(1, total * 9 // 10), count - 2), total * 9 // 10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_command_starts(number: int) -> None:
    for moment in moments(4, "edgecompose", "inspect", "absent"):
        done = at_event(number, moment, "edgecompose", "inspect", "absent")
        assert (done.returncode, done.stdout, done.stderr.strip()) == (128 + number, "", ""), moment


def test_a_signal_while_the_export_starts() -> None:
    for moment in moments(3, "edgecompose_export", "fetch", "--list"):
        done = at_event(signal.SIGINT, moment, "edgecompose_export", "fetch", "--list")
        assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", ""), moment


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_command_works(bundle: Path, tmp_path: Path, number: int) -> None:
    arguments = ("compose", bundle, PROMPT, "--format", "peft", "-o")
    for moment in moments(6, "edgecompose", *arguments, tmp_path / "whole"):
        output = tmp_path / f"at-{moment}"
        done = at_event(number, moment, "edgecompose", *arguments, output)
        assert (done.returncode, done.stderr.strip()) == (128 + number, ""), moment
        left = [path.name for path in tmp_path.glob(f"*{output.name}*")]
        assert left in ([], [output.name]), moment
        assert not left or contents(output) == contents(tmp_path / "whole"), moment


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


#: A command whose work is a body of code.
WORK = """
import contextlib, ctypes, os, signal, sys, time
import click
from edgecompose.cli.terminal import signals
signals.exit_at_once()
from edgecompose.cli.terminal.errors import ErrorGroup
main = ErrorGroup("main")
@main.command()
def work():
    {body}
main(["work"])
"""


def work(body: str, *numbers: int, before: str = "") -> tuple[int, str, str]:
    """Exit code and output of a command that gets signals once it printed a line."""
    code = WORK.format(body="\n    ".join(body.splitlines())).replace("main([", f"{before}\nmain([")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=hear_signals,
    )
    assert process.stdout is not None
    begun = process.stdout.readline()
    for number in numbers:
        process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, begun + out, err.strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_unwinds_the_work(number: int) -> None:
    body = """
try:
    print("begun", flush=True)
    time.sleep(60)
finally:
    print("cleaned up", flush=True)
"""
    assert work(body, number) == (128 + number, "begun\ncleaned up\n", "")


def test_the_second_signal_ends_a_clean_up_that_lasts() -> None:
    body = """
try:
    print("begun", flush=True)
    time.sleep(60)
finally:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    assert work(body, signal.SIGINT) == (130, "begun\n", "")


def test_native_code_that_does_not_return_is_ended_after_the_grace() -> None:
    body = """
libc = ctypes.CDLL(None)
# the thread that watches gets the signal, and the sleep goes on
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGURG])
print("begun", flush=True)
libc.sleep(60)
"""
    assert work(body, signal.SIGINT, before="signals.GRACE = 0.2") == (130, "begun\n", "")


def test_a_signal_that_does_not_end_a_wait_is_heard_all_the_same() -> None:
    body = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the wait goes on, as if the signal came right before it
try:
    print("begun", flush=True)
    ctypes.CDLL(None).sleep(60)
finally:
    print("cleaned up", flush=True)
"""
    assert work(body, signal.SIGINT) == (130, "begun\ncleaned up\n", "")


def test_an_import_is_not_interrupted(tmp_path: Path) -> None:
    """Extension modules abort the process where an exception comes out of what they import."""
    (tmp_path / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(0.5)\nprint('imported')")
    body = f"""
sys.path.insert(0, {str(tmp_path)!r})
try:
    import slow
    print("goes on", flush=True)
    time.sleep(60)
finally:
    print("cleaned up", flush=True)
"""
    code, out, err = work(body, signal.SIGINT)
    assert (code, err) == (130, "")
    assert out in ("begun\nimported\ncleaned up\n", "begun\nimported\ngoes on\ncleaned up\n")
    assert work(body, signal.SIGINT, signal.SIGTERM)[1] == "begun\n"
    (tmp_path / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    assert work(body, signal.SIGINT) == (130, "begun\n", "")


def test_few_files_are_left_to_the_work(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)", encoding="utf-8")
    body = f"""
import threading
sys.path.insert(0, {str(tmp_path)!r})
print(threading.active_count(), end=" ")
import slow
"""
    assert work(body, signal.SIGINT) == (130, "2 begun\n", "")
    limited = work(body, signal.SIGINT, before="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))")
    assert limited == (130, "1 begun\n", "")


def test_a_signal_in_a_destructor_is_not_lost() -> None:
    body = """
class Trap:
    def __del__(self):
        print("begun", flush=True)
        time.sleep(60)
del (trap := [Trap()])[0]
time.sleep(60)
"""
    assert work(body, signal.SIGINT) == (130, "begun\n", "")


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    code = "from edgecompose.cli.terminal import signals as s; import signal as g; s.exit_at_once(); "
    code += "print(g.getsignal(g.SIGHUP) is g.SIG_IGN, g.getsignal(g.SIGTERM) is s._exit)\n"
    code += "with s.handling(g.SIGHUP, s._exit): print(g.getsignal(g.SIGHUP) is g.SIG_IGN)"
    line = ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=True, preexec_fn=hear_signals)
    assert done.stdout == "True True\nTrue\n"


def test_control_c_at_a_question_ends_the_command() -> None:
    code = WORK.format(body="click.confirm('Do you agree?')")
    for keys, expected in (("\x03", 130), ("\x04", 1)):
        with Terminal([sys.executable, "-c", code]) as terminal:
            terminal.wait_for("Do you agree?")
            terminal.type(keys)
            assert terminal.exit_code() == expected
            assert "Traceback" not in terminal.shown


def test_progress_leaves_a_cursor() -> None:
    """A bar hides it; a signal in the middle shows it again."""
    body = """
from edgecompose.cli.console import counting
with counting("working", 2):
    print("begun", flush=True)
    time.sleep(60)
"""
    with Terminal([sys.executable, "-c", WORK.format(body="\n    ".join(body.splitlines()))]) as terminal:
        terminal.wait_for("begun")
        terminal.type("\x03")
        assert terminal.exit_code() == 130
        assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l")
        assert "Traceback" not in terminal.shown
