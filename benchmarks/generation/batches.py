"""Tokens a second of several sequences that are written at once, against one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measuring.requests import Kind, answered, greedy_requests, numbered_prompts
from edgecompose import Answer, Composer

#: Tokens of the shorter of two answers: what the longer takes beyond it is decoding alone.
SHORT = 4


@dataclass(frozen=True, slots=True)
class Written:
    """The answers of one batch, and its seconds."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """Of all answers together."""
        return sum(answer.generated_tokens for answer in self.answers)


def write_batch(composer: Composer, kind: Kind, size: int, *, tokens: int, parallel: int | None = None) -> Written:
    """Write `size` answers of `tokens` tokens at once, or `parallel` of them at a time."""
    requests = greedy_requests(sorted(composer.bundle.manifest.adapters), kind, size, tokens=tokens)
    start = time.perf_counter()
    results = list(composer.batch(numbered_prompts(size), requests, parallel=parallel or size))
    return Written(tuple(map(answered, results)), time.perf_counter() - start)


def measure_batches(
    composer: Composer, *, kinds: Sequence[Kind], sizes: Sequence[int], tokens: int, rounds: int
) -> dict[str, Any]:
    """For each kind of blends, `measure_kind`."""
    return {kind: measure_kind(composer, kind, sizes=sizes, tokens=tokens, rounds=rounds) for kind in kinds}


def measure_kind(
    composer: Composer, kind: Kind, *, sizes: Sequence[int], tokens: int, rounds: int
) -> dict[str, dict[int, float]]:
    """By number of sequences: rates, their ratios to those of the first, and how many answers are those alone.

    Sizes take turns within a round. Blends are merged before. `whole` reads the prompts too, `decode` does not: it is
    what answers of `tokens` tokens take beyond such of SHORT.
    """
    alone = write_batch(composer, kind, max(sizes), tokens=tokens, parallel=1)
    texts = [answer.text for answer in alone.answers]
    seconds: dict[int, dict[int, list[float]]] = {size: {SHORT: [], tokens: []} for size in sizes}
    written, equal = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    for _ in range(rounds):
        for size in sizes:
            for length, times in seconds[size].items():
                batch = write_batch(composer, kind, size, tokens=length)
                times.append(batch.seconds)
            written[size] = batch.tokens
            equal[size] = sum(a.text == text for a, text in zip(batch.answers, texts, strict=False))
    whole = {size: [written[size] / s for s in seconds[size][tokens]] for size in sizes}
    decode = {size: decode_rate(seconds[size], written[size] - size * SHORT) for size in sizes}
    first = sizes[0]
    return {
        "decode_ratio": {size: decode[size] / decode[first] for size in sizes},
        "whole_ratio": {size: statistics.median(_ratios(whole[size], whole[first])) for size in sizes},
        "decode_tokens_per_s": decode,
        "whole_tokens_per_s": {size: statistics.median(rates) for size, rates in whole.items()},
        "tokens": {size: float(count) for size, count in written.items()},
        "equal_to_alone": {size: float(count) for size, count in equal.items()},
    }


def decode_rate(seconds: Mapping[int, Sequence[float]], tokens: int) -> float:
    """Tokens a second, from the median seconds of short and of long answers.

    Args:
        seconds: by length; the longer last.
        tokens: by which all long answers together are longer.
    """
    short, long = (statistics.median(times) for times in seconds.values())
    return tokens / max(long - short, 1e-9)


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]
