"""How long each stage of an answer took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: In the order of the data flow; `load` is files read on first use, `total` all of it.
STAGES = ("load", "embed", "retrieve", "weigh", "merge", "fuse", "prefill", "decode", "total")


@dataclass(slots=True)
class Clock:
    """Milliseconds spent in each stage."""

    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] += (time.perf_counter() - start) * 1e3
