"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: Path, *, put: Callable[[Path, Path], object] = Path.rename) -> Iterator[Path]:
    """A folder beside `output` to write to, which gets that name when the block ends well, and is removed if not.

    Args:
        put: gives the folder (first) that name (second), by default where nothing has it.

    Raises:
        OSError: it cannot be made or renamed, as where `output` holds something.
    """
    work = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        put(work, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
