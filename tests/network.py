"""Processes that have no network."""

from __future__ import annotations

import shutil
import subprocess


def without_network() -> list[str] | None:
    """What starts a process that has no network at all, None where this machine does not allow that."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode:
        return None
    return [unshare, "-rn"]
