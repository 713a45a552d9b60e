"""Tokens a second of decoding and of reading prompts, under the blends of a bundle, beside other runtimes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.generation.blends import compose_blends, llama_variants, openvino_variants, write_loras, write_peft
from benchmarks.measuring import decoders, llama, openvino
from benchmarks.measuring.prompts import LENGTHS, PROMPT
from benchmarks.measuring.timing import TimedStep, median_ratio, medians, rates_in_turns
from edgecompose import Composer, open_bundle
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.merged import MergedAdapter

_ROOT = Path(__file__).resolve().parents[2]
#: The script that measures decoding in a process of its own.
_SCRIPT = _ROOT / "benchmarks" / "speed.py"
#: Where OpenVINO's graphs of GGUF files are kept.
OPENVINO_GRAPHS = _ROOT / "build" / "openvino"
#: Tokens before the first that is timed; every round starts there again.
PROMPT_TOKENS = 128
#: The other runtimes, by the beginning of their variants' names.
RIVALS = ("llama_cpp", "openvino")
#: Greedy tokens that are compared with those of OpenVINO.
_COMPARED = 24
_RATIOS = tuple(f"ratio_{rival}_{work}" for rival in RIVALS for work in ("same_work", "alone"))
_MEDIAN_FIELDS = ("median", "slower_than_base_alone", *_RATIOS)


def decode_in_processes(bundle: Path, gguf: Path, *, rounds: int, processes: int) -> dict[str, Any]:
    """Medians of `measure_decode` over fresh processes, and the range of the ratios."""
    command = [sys.executable, str(_SCRIPT), str(bundle), "--gguf", str(gguf), "--rounds", str(rounds)]
    results = [
        json.loads(subprocess.run([*command, "--worker"], check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        for _ in range(max(1, processes))
    ]
    first = results[0]
    summary: dict[str, Any] = {"processes": len(results), "rank": first["rank"]}
    for field in _MEDIAN_FIELDS:
        if field in first:
            summary[field] = {n: statistics.median(result[field][n] for result in results) for n in first[field]}
    for field in _RATIOS:
        if field in first:
            values = {name: [result[field][name] for result in results] for name in first[field]}
            summary[f"{field}_range"] = {name: (min(row), max(row)) for name, row in values.items()}
    kept = ("discarded_energy", "openvino_answers", "openvino_left_out")
    return summary | {field: first[field] for field in kept if field in first}


def measure_decode(bundle: Path, gguf: Path, *, rounds: int, tokens: int = 32) -> dict[str, Any]:
    """Tokens a second of each variant, taking turns: the median over rounds, and ratios to the other runtimes."""
    with open_bundle(bundle, device="cpu") as composer, tempfile.TemporaryDirectory() as folder:
        decoder, ids = composer.model.decoder, (composer.model.tokenizer.encode(PROMPT) * 9)[:PROMPT_TOKENS]
        blends, capacity = compose_blends(composer), PROMPT_TOKENS + tokens + 1
        variants = {name: decoders.token_steps(decoder, b, ids, capacity=capacity) for name, b in blends.items()}
        if llama.is_available(gguf):
            loras = write_loras(blends, composer.bundle.manifest.base, Path(folder))
            for name, setup in llama_variants(gguf, loras).items():
                variants[name] = llama.token_steps(setup.open(), ids, capacity=capacity)
        timed, notes = _openvino_steps(composer, gguf, ids, blends=blends, folder=Path(folder), tokens=tokens)
        rates = rates_in_turns(variants, tokens=tokens, rounds=rounds, calls=tokens, untimed_calls=1, timed=timed)
    ranks = {name: max((m.rank for m in blend.modules.values()), default=0) for name, blend in blends.items()}
    slower = {name: median_ratio(rates["base_alone"], rates[name]) - 1 for name in blends if ranks[name]}
    return {
        "rank": ranks,
        **_summary(rates),
        "slower_than_base_alone": slower,
        "discarded_energy": blends["three_adapters_svd"].report.discarded_energy,
        **notes,
    }


def _openvino_steps(
    composer: Composer,
    gguf: Path,
    ids: list[int],
    *,
    blends: Mapping[str, MergedAdapter],
    folder: Path,
    tokens: int,
) -> tuple[dict[str, TimedStep], dict[str, Any]]:
    """OpenVINO GenAI's variants, with a comparison of its answers with ours; or why it is left out."""
    if not openvino.is_available(gguf):
        return {}, {}
    try:
        graph = openvino.convert(gguf, OPENVINO_GRAPHS, composer.bundle.manifest.base)
    except openvino.Unreadable as error:
        return {}, {"openvino_left_out": str(error)}
    setups = openvino_variants(graph, write_peft(composer, folder))
    opened = {name: setup.open() for name, setup in setups.items()}
    texts = {}
    for name, pipeline in opened.items():
        ours = _greedy(composer.model.decoder, blends[name.removeprefix("openvino_")], ids)
        theirs = openvino.writer(pipeline, ids, tokens=_COMPARED)()[0]
        texts[name] = {"ours": ours, "openvino": theirs, "equal_tokens": _equal_prefix(ours, theirs)}
    return {name: openvino.decoding(pipeline, ids, tokens=tokens) for name, pipeline in opened.items()}, {
        "openvino_answers": texts
    }


def _greedy(decoder: Decoder, blend: MergedAdapter, ids: list[int]) -> list[int]:
    """Our greedy answer, end tokens ignored."""
    state = decoder.start(blend, len(ids) + _COMPARED)
    written = [int(state.forward(ids)[0].argmax())]
    while len(written) < _COMPARED:
        written.append(int(state.step(written[-1:])[0].argmax()))
    return written


def _equal_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))


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
    """Medians and bests of all variants; ours against each other runtime at the same work and without any adapter."""
    result: dict[str, Any] = {"median": medians(rates), "best": {name: max(values) for name, values in rates.items()}}
    ours = [name for name in rates if not name.startswith(RIVALS)]
    for rival in RIVALS:
        alone = rates.get(f"{rival}_base_alone")
        if alone is not None:
            works = {name: f"{rival}_{name.removesuffix('_svd')}" for name in ours}
            same = {name: work for name, work in works.items() if work in rates}
            result[f"ratio_{rival}_same_work"] = {n: median_ratio(rates[n], rates[other]) for n, other in same.items()}
            result[f"ratio_{rival}_alone"] = {name: median_ratio(rates[name], alone) for name in ours}
    return result
