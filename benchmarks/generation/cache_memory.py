"""Memory and speed of the kinds of KV cache, each in a process of its own."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.generation.batches import write_batch
from benchmarks.measuring.memory import peak_growth
from benchmarks.measuring.processes import run
from benchmarks.measuring.prompts import TASK_PROMPTS
from benchmarks.measuring.requests import answered, greedy_requests
from edgecompose import Composer, open_bundle
from edgecompose.engine.memory import release_freed_memory

#: Tokens that each sequence writes after its prompt.
WRITTEN = 16
_RUNS = 3
#: The script that runs as the worker process.
_SCRIPT = Path(__file__).resolve().parents[1] / "batching.py"


def measure_caches(bundle: Path, kinds: Sequence[str], *, sequences: int, length: int) -> dict[str, Any]:
    """`cache_in_this_process` of each kind, with the ratios to the first and how many answers are its."""
    command = [sys.executable, str(_SCRIPT), str(bundle), "--sequences", str(sequences), "--length", str(length)]
    results: dict[str, Any] = {}
    for kind in kinds:
        results[kind] = json.loads(run([*command, "--worker", kind]).output.splitlines()[-1])
    first = results[kinds[0]]
    for result in results.values():
        result["equal_answers"] = sum(a == b for a, b in zip(result["texts"], first["texts"], strict=True))
        for field in ("beyond_model_mb", "tokens_per_s"):
            result[f"{field}_ratio"] = result[field] / first[field]
    for result in results.values():
        del result["texts"]
    return results


def cache_in_this_process(bundle: Path, kind: str, *, sequences: int, length: int) -> dict[str, Any]:
    """Peak memory beyond the loaded model while sequences of `length` tokens are written at once, and speed at the end.

    The base alone answers: blends take memory of their own, whatever the cache.

    Raises:
        SystemExit: the system does not report memory.
    """
    options: dict[str, Any] = {} if kind == "float32" else {"kv_cache": kind}
    with open_bundle(bundle, device="cpu", **options) as composer:
        composer.warm_up()
        write_batch(composer, "base_alone", 1, tokens=2)
        prompts = long_prompts(composer, sequences, length - WRITTEN)
        requests = greedy_requests([], "base_alone", sequences, tokens=WRITTEN)
        results: list[Any] = []
        release_freed_memory()
        growth = peak_growth(lambda: results.extend(composer.batch(prompts, requests, parallel=sequences)))
        if growth is None:
            raise SystemExit("peak memory is measured on Linux only")
        answers = list(map(answered, results))
        rates = []
        for _ in range(_RUNS):  # the first reads the prompt, the others find it
            answer = composer.run(prompts[0], replace(requests[0], prompt_cache=True))
            rates.append(1e3 * answer.generated_tokens / answer.timings_ms["decode"])
    spec = composer.bundle.manifest.base
    values = 2 * spec.layers * spec.kv_heads * spec.head_size * sequences * length
    return {
        "beyond_model_mb": growth / 1e6,
        "float32_cache_mb": 4 * values / 1e6,
        "tokens_per_s": statistics.median(rates),
        "tokens": [answer.prompt_tokens + answer.generated_tokens for answer in answers],
        "texts": [answer.text for answer in answers],
    }


def long_prompts(composer: Composer, count: int, length: int) -> list[str]:
    """Texts of about `length` tokens that all differ."""
    tokenizer, prompts = composer.model.tokenizer, []
    for number in range(count):
        ids = tokenizer.encode(f"{number}. " + "\n\n".join(TASK_PROMPTS) * (1 + length // 100))
        prompts.append(tokenizer.decode(ids[:length]))
    return prompts
