"""Tokens a second of decoding and of reading prompts, under the blends of a bundle, beside llama.cpp."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.generation.blends import compose_blends, llama_variants, write_loras
from benchmarks.measuring import decoders, llama
from benchmarks.measuring.prompts import LENGTHS, PROMPT, SHORT_PROMPT
from benchmarks.measuring.timing import median_ratio, medians, rates_in_turns
from edgecompose import Composer, open_bundle

#: The script that measures decoding in a process of its own.
_SCRIPT = Path(__file__).resolve().parents[1] / "speed.py"
#: Longest sequence while decoding is timed; a full one starts again after the prompt.
_CAPACITY = 500
_MEDIAN_FIELDS = ("median", "slower_than_base_alone", "ratio_same_work", "ratio_to_llama_cpp_alone")


def decode_in_processes(bundle: Path, gguf: Path, *, rounds: int, processes: int) -> dict[str, Any]:
    """Medians of `measure_decode` over fresh processes, and the range of the ratios."""
    command = [sys.executable, str(_SCRIPT), str(bundle), "--gguf", str(gguf), "--rounds", str(rounds)]
    results = [
        json.loads(subprocess.run([*command, "--only-decode"], check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(max(1, processes))
    ]
    first = results[0]
    summary: dict[str, Any] = {"processes": len(results), "rank": first["rank"]}
    for field in _MEDIAN_FIELDS:
        if field in first:
            summary[field] = {n: statistics.median(result[field][n] for result in results) for n in first[field]}
    if "ratio_same_work" in first:
        ratios = {name: [result["ratio_same_work"][name] for result in results] for name in first["ratio_same_work"]}
        summary["ratio_same_work_range"] = {name: (min(values), max(values)) for name, values in ratios.items()}
    return summary | {"discarded_energy": first["discarded_energy"]}


def measure_decode(bundle: Path, gguf: Path, *, rounds: int, tokens: int = 32) -> dict[str, Any]:
    """Tokens a second of each variant, taking turns: the median over rounds, and ratios to llama.cpp."""
    with open_bundle(bundle, device="cpu") as composer, tempfile.TemporaryDirectory() as folder:
        tokenizer, decoder = composer.model.tokenizer, composer.model.decoder
        ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": SHORT_PROMPT}]))
        blends = compose_blends(composer)
        variants = {name: decoders.token_steps(decoder, b, ids, capacity=_CAPACITY) for name, b in blends.items()}
        if llama.is_available(gguf):
            loras = write_loras(blends, composer.bundle.manifest.base, Path(folder))
            for name, setup in llama_variants(gguf, loras).items():
                variants[name] = llama.token_steps(setup.open(), ids, capacity=_CAPACITY)
    rates = rates_in_turns(variants, tokens=tokens, rounds=rounds, calls=tokens, untimed_calls=1)
    ranks = {name: max((m.rank for m in blend.modules.values()), default=0) for name, blend in blends.items()}
    slower = {name: median_ratio(rates["base_alone"], rates[name]) - 1 for name in blends if ranks[name]}
    return {
        "rank": ranks,
        **_summary(rates),
        "slower_than_base_alone": slower,
        "discarded_energy": blends["three_adapters_svd"].report.discarded_energy,
    }


def measure_prefill(composer: Composer, gguf: Path, loras: Mapping[str, Path], *, rounds: int) -> dict[str, Any]:
    """Tokens a second at which prompts are read, the choice of the first token included, by number of tokens."""
    blends = compose_blends(composer)
    result: dict[str, Any] = {}
    for length in LENGTHS:
        ids = composer.model.tokenizer.encode(PROMPT * 40)[:length]
        variants = {name: decoders.readings(composer.model.decoder, blend, ids) for name, blend in blends.items()}
        if llama.is_available(gguf):
            variants |= {n: llama.readings(setup.open(), ids) for n, setup in llama_variants(gguf, loras).items()}
        result[str(length)] = _summary(rates_in_turns(variants, tokens=length, rounds=rounds, warm_up=1))
    return result


def _summary(rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians and bests of all variants; ours against llama.cpp at the same work and without any adapter."""
    result: dict[str, Any] = {"median": medians(rates), "best": {name: max(values) for name, values in rates.items()}}
    alone = rates.get("llama_cpp_base_alone")
    if alone is not None:
        same = {n: f"llama_cpp_{n.removesuffix('_svd')}" for n in rates if not n.startswith("llama_cpp_")}
        result["ratio_same_work"] = {n: median_ratio(rates[n], rates[theirs]) for n, theirs in same.items()}
        result["ratio_to_llama_cpp_alone"] = {n: median_ratio(rates[n], alone) for n in same}
    return result
