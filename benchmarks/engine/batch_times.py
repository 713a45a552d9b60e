"""Rates of several sequences at once on two devices, each under a blend of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.generation.batches import measure_kind
from benchmarks.measuring.bundles import without_end_tokens
from edgecompose.bundle.files import Bundle
from edgecompose.composer import Composer
from edgecompose.engine.device import Device

SIZES = (1, 8, 32)
TOKENS = 32


@dataclass(frozen=True, slots=True)
class BatchRate:
    """Tokens a second of some sequences together, prompts left out, and its ratio to one sequence.

    `equal` of the answers are those that the same sequence gets alone on the same device.
    """

    device: str
    sequences: int
    tokens_per_s: float
    of_one: float
    equal: int

    @property
    def passed(self) -> bool:
        """Whether company changes no answer."""
        return self.equal == self.sequences


def batch_rates(
    bundle: Path, device: Device, *, rounds: int, sizes: Sequence[int] = SIZES, tokens: int = TOKENS
) -> list[BatchRate]:
    """Greedy answers of `tokens` tokens, under as many different blends as sequences."""
    with tempfile.TemporaryDirectory() as folder:
        copy = without_end_tokens(bundle, Path(folder) / "bundle")
        with Composer(Bundle(copy), device) as composer:
            rows = measure_kind(composer, "different_blends", sizes=sizes, tokens=tokens, rounds=rounds)
    return [
        BatchRate(
            device.kind,
            size,
            tokens_per_s=rows["decode_tokens_per_s"][size],
            of_one=rows["decode_ratio"][size],
            equal=int(rows["equal_to_alone"][size]),
        )
        for size in sizes
    ]
