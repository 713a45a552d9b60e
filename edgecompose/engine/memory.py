"""Returns freed memory to the system."""

from __future__ import annotations

import ctypes
import sys


def release_freed_memory() -> None:
    """Let glibc give back the pages that it keeps of what was freed; elsewhere nothing is done.

    It keeps them for the process, which never asks for as much again once its models are loaded.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # other C libraries, such as musl, have none and keep less
            trim(0)
