"""Milliseconds from a prompt to a composed adapter, and to the first token of an answer."""

from __future__ import annotations

import statistics
import time

from benchmarks.generation.blends import three_adapters
from benchmarks.measuring.prompts import LENGTHS, PROMPT
from benchmarks.measuring.timing import elapsed_ms, medians
from edgecompose import Composer, Request
from edgecompose.engine.merged import MergedAdapter

_WARM_UP = 3


def measure_compose(composer: Composer, runs: int = 30) -> dict[str, float]:
    """Milliseconds from a prompt to three adapters composed and bound to the decoder, all parts loaded.

    `new`: a prompt and weights never seen before. `cached`: the same prompt again. `retrieve`, `merge` and `bind` are
    the medians of the parts of `new`.
    """
    names = three_adapters(composer)
    stages: dict[str, list[float]] = {"retrieve": [], "merge": [], "bind": [], "new": []}
    for turn in range(runs + _WARM_UP):
        weights = {name: 1 / 3 + 1e-3 * turn * (i - 1) for i, name in enumerate(names)}
        times = _compose_new(composer, f"{PROMPT} {turn}", weights)
        if turn >= _WARM_UP:
            for name, elapsed in times.items():
                stages[name].append(elapsed)
    cached = []
    for _ in range(runs):
        start = time.perf_counter()
        _bind(composer, composer.compose(PROMPT).merged)
        cached.append(elapsed_ms(start))
    return {
        **medians(stages),
        "new_best": min(stages["new"]),
        "cached": statistics.median(cached),
        "prompt_tokens": len(composer.model.tokenizer.encode_prompt(PROMPT)),
        "rank": float(sum(composer.blends.adapter(name).rank for name in names)),
    }


def _compose_new(composer: Composer, prompt: str, weights: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each stage: retrieval for a prompt, a merge at weights that no cache holds, and binding."""
    start = time.perf_counter()
    composer.retrieve(prompt)
    retrieved = time.perf_counter()
    merged = composer.compose(PROMPT, Request(weights=weights)).merged
    blended = time.perf_counter()
    _bind(composer, merged)
    end = time.perf_counter()
    seconds = {"retrieve": retrieved - start, "merge": blended - retrieved, "bind": end - blended, "new": end - start}
    return {name: 1e3 * value for name, value in seconds.items()}


def _bind(composer: Composer, merged: MergedAdapter) -> None:
    composer.model.decoder.start(merged, 256)


def measure_first_token(composer: Composer, runs: int = 15) -> dict[str, float]:
    """Median milliseconds from a prompt never seen before to the first chunk of its answer, all parts loaded.

    It covers embedding, retrieval, merging and reading the prompt. Results are by the prompt's number of tokens.
    """
    result = {}
    for length in LENGTHS:
        words = composer.model.tokenizer.encode(PROMPT * 40)[8 - length :]
        times = []
        for turn in range(runs + 1):
            prompt = f"{turn} {composer.model.tokenizer.decode(words)}"
            start = time.perf_counter()
            with composer.generate(prompt, Request(max_tokens=2)) as generation:
                next(iter(generation), None)
                times.append(elapsed_ms(start))
        result[str(length)] = statistics.median(times[1:])
    return result
