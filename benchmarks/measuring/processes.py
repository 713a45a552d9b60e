"""Commands in a process of their own: time and peak memory of one are not those of another."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finished:
    """Seconds that a process ran, its peak resident memory in MB (10^6 bytes), and its standard output."""

    seconds: float
    peak_mb: float
    output: str


def run(command: Sequence[str]) -> Finished:
    """Run a command to its end.

    Raises:
        SystemExit: it failed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            message = errors.read().decode(errors="replace").strip()[-800:]
            raise SystemExit(f"{' '.join(command[:4])} failed: {message}")
        output.seek(0)
        return Finished(seconds, usage.ru_maxrss * 1024 / 1e6, output.read().decode(errors="replace"))
