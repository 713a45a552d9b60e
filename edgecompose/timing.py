"""Measures the stages of an answer."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")
#: In the order of the data flow; `load` is files read on first use, `total` all of it.
STAGES = ("load", "embed", "retrieve", "weigh", "merge", "fuse", "prefill", "decode", "total")


@dataclass(slots=True)
class Timings:
    """Milliseconds of each stage, added up."""

    elapsed_ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.elapsed_ms[name] += (time.perf_counter() - start) * 1e3

    def each(self, items: Generator[T, None, R], stage: str) -> Generator[T, None, R]:
        """The same items and result; the time that each takes to come is added to a stage. Closing this closes them."""
        try:
            while True:
                with self.stage(stage):
                    try:
                        item = next(items)
                    except StopIteration as end:
                        return cast(R, end.value)
                yield item
        finally:
            items.close()
