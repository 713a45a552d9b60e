"""Tokens a second of several sequences that are written at once, against one."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measuring.requests import Kind, answered, greedy_requests, numbered_prompts
from edgecompose import Answer, Composer
from edgecompose.engine.decoding.decoder_state import DecoderState, Float


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


def write_together(composer: Composer, kind: Kind, size: int, *, tokens: int) -> float:
    """Seconds in which `size` sequences write `tokens` tokens each, in threads, once all have read their prompts."""
    requests = greedy_requests(sorted(composer.bundle.manifest.adapters), kind, size, tokens=tokens)
    ready, threads = threading.Barrier(size + 1), []

    def write(state: DecoderState, logits: Float) -> None:
        ready.wait()
        for _ in range(tokens):
            logits = state.step([int(logits.argmax())])[0]
        state.leave(keep=0)

    for prompt, request in zip(numbered_prompts(size), requests, strict=True):
        ids = composer.model.tokenizer.encode(prompt)
        state = composer.model.decoder.start(composer.compose(prompt, request).merged, len(ids) + tokens)
        threads.append(threading.Thread(target=write, args=(state, state.forward(ids)[-1].copy())))
        threads[-1].start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def measure_batches(
    composer: Composer, *, kinds: Sequence[Kind], sizes: Sequence[int], tokens: int, rounds: int
) -> dict[str, Any]:
    """For each kind of blends, `measure_kind`."""
    return {kind: measure_kind(composer, kind, sizes=sizes, tokens=tokens, rounds=rounds) for kind in kinds}


def measure_kind(
    composer: Composer, kind: Kind, *, sizes: Sequence[int], tokens: int, rounds: int
) -> dict[str, dict[int, float]]:
    """By number of sequences: rates, their ratios to those of the first, and how many answers are those alone.

    Sizes take turns within a round. Blends are merged before. `whole` reads the prompts too; `decode` is of sequences
    that have read theirs and begin to write at once.
    """
    alone = write_batch(composer, kind, max(sizes), tokens=tokens, parallel=1)
    texts = [answer.text for answer in alone.answers]
    whole: dict[int, list[float]] = {size: [] for size in sizes}
    decode: dict[int, list[float]] = {size: [] for size in sizes}
    written, equal = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    for _ in range(rounds):
        for size in sizes:
            batch = write_batch(composer, kind, size, tokens=tokens)
            whole[size].append(batch.tokens / batch.seconds)
            decode[size].append(size * tokens / write_together(composer, kind, size, tokens=tokens))
            written[size] = batch.tokens
            equal[size] = sum(a.text == text for a, text in zip(batch.answers, texts, strict=False))
    first = sizes[0]
    return {
        "decode_ratio": {size: statistics.median(_ratios(decode[size], decode[first])) for size in sizes},
        "whole_ratio": {size: statistics.median(_ratios(whole[size], whole[first])) for size in sizes},
        "decode_tokens_per_s": {size: statistics.median(rates) for size, rates in decode.items()},
        "whole_tokens_per_s": {size: statistics.median(rates) for size, rates in whole.items()},
        "tokens": {size: float(count) for size, count in written.items()},
        "equal_to_alone": {size: float(count) for size, count in equal.items()},
    }


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]
