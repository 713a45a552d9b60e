"""Memory of this process, as Linux reports it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def resident_bytes() -> int | None:
    """Bytes of this process that lie in memory; None on a system without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def private_mb() -> float:
    """Resident memory that is not a page of a file, in MB (10^6 bytes); 0 on a system without /proc."""
    try:
        return _status_bytes("RssAnon") / 1e6
    except OSError:
        return 0.0


def peak_growth(run: Callable[[], object]) -> int | None:
    """Bytes by which the peak of resident memory during `run` exceeds its value before; None outside Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = _status_bytes("VmRSS")
        run()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}")
