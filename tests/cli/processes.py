"""The command in processes of its own, at a shell or at a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
#: Seconds that anything may take on a busy machine.
PATIENCE = 60.0


def environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON", "EDGECOMPOSE_"))}
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'export'}", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **paths, **variables}


def hear_signals() -> None:
    """What a job in the background ignores, a test's process hears."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def command(*arguments: object, module: str = "edgecompose") -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def run_in_shell(
    redirections: str, *arguments: object, stdin: str | None = None, **variables: str
) -> tuple[int, str, str]:
    """Exit code and output of the command with a shell's redirections."""
    line = ["sh", "-c", f'exec "$0" "$@" {redirections}', *command(*arguments)]
    done = subprocess.run(
        line,
        input=None if stdin is None else stdin.encode(),
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        env=environment(**variables),
        check=False,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


class Terminal:
    """A process at a pseudo-terminal, which a test types into."""

    def __init__(self, arguments: list[str], variables: Mapping[str, str] | None = None) -> None:
        self.shown = ""
        self._seen = 0
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:  # pragma: no cover - the child
            hear_signals()
            os.execve(arguments[0], arguments, environment(**{"TERM": "xterm", **(variables or {})}))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.descriptor)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, text: str) -> str:
        """What was shown up to a text that comes after all that was waited for; what is shown is kept."""
        end = time.monotonic() + PATIENCE
        while text not in self.shown[self._seen :]:
            assert time.monotonic() < end, f"{text!r} was not shown after {self.shown!r}"
            if not self.read():
                assert text in self.shown[self._seen :], f"{text!r} was not shown in {self.shown!r}"
        begin, self._seen = self._seen, self.shown.index(text, self._seen) + len(text)
        return self.shown[begin : self._seen]

    def exit_code(self) -> int:
        """Wait for the end of the process."""
        end = time.monotonic() + PATIENCE
        while self.read():
            assert time.monotonic() < end, f"the process did not end: {self.shown!r}"
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def read(self) -> bool:
        """Read what is shown; whether there may be more."""
        if select.select([self.descriptor], [], [], 0.1)[0]:
            try:
                content = os.read(self.descriptor, 1 << 16)
            except OSError:  # Linux's way to say that the other side is closed
                return False
            self.shown += content.decode("utf-8", "replace")
            return bool(content)
        return True
