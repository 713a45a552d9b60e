"""Speed of the whole way on this machine: compose, decode, cold start; against llama.cpp on the same GGUF.

    python benchmarks/speed.py models/demo [--gguf FILE] [--save DIR]

llama.cpp is measured when `llama-cpp-python` is installed (`pip install llama-cpp-python` compiles it in some
minutes). Our decoder and llama.cpp take turns, round by round, in one process with the same number of threads, so
that both see the same machine. llama.cpp runs alone, and with the very blends that we run, written as its LoRA files:
the same work, and the ratio to look at. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgecompose import Composer, MergeSettings, Request, open_bundle
from edgecompose.blend import MergedAdapter
from edgecompose.device import runtime_version
from edgecompose.gguf_lora import write_gguf_lora
from edgecompose.manifest import BaseSpec

PROMPT = (
    "Customer review of a business: We waited forty minutes for a table we had booked, and the soup came cold. "
    "The waiter was kind about it and took it off the bill, but I would not go back on a busy evening.\n"
    "Would you call this customer's experience positive or negative?\nAnswer:"
)
SHORT = "What is the capital of France?"
GGUF = Path("build/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf")
Step = Callable[[], None]
#: Share of the blend's squared norm that `three_adapters_svd` keeps.
_ENERGY = 0.99


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path, default=GGUF, help="the base as GGUF, for llama.cpp")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--save", type=Path, help="folder for a dated JSON file")
    options = parser.parse_args()
    with open_bundle(options.bundle, device="cpu") as composer:
        composer.warm_up()
        compose = measure_compose(composer)
        decode = measure_decode(composer, options.gguf, options.rounds)
    result = {
        "compose_ms": compose, "decode_tokens_per_s": decode, "cold_start_s": measure_cold_start(options.bundle),
        "machine": machine(), "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip
    print_table(result)
    line = json.dumps(result)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / f"{result['date']}-speed.json").write_text(line + "\n", encoding="utf-8")
    print(line)


def measure_compose(composer: Composer, runs: int = 30) -> dict[str, float]:
    """Milliseconds from a prompt to three adapters composed and bound to the decoder, all parts loaded.

    `new`: a prompt and weights never seen before; `cached`: the same prompt again. `retrieve`, `merge` and `bind` are
    the medians of what `new` is made of.
    """
    names = _three(composer)
    stages: dict[str, list[float]] = {"retrieve": [], "merge": [], "bind": [], "new": []}
    for turn in range(runs + 3):
        weights = {name: 1 / 3 + 1e-3 * turn * (i - 1) for i, name in enumerate(names)}
        start = time.perf_counter()
        composer.retrieve(f"{PROMPT} {turn}")
        retrieved = time.perf_counter()
        merged = composer.compose(PROMPT, Request(weights=weights)).merged
        blended = time.perf_counter()
        _bind(composer, merged)
        end = time.perf_counter()
        if turn >= 3:
            spent = (retrieved - start, blended - retrieved, end - blended, end - start)
            for name, seconds in zip(stages, spent, strict=True):
                stages[name].append(seconds * 1e3)
    cached = []
    for _ in range(runs):
        start = time.perf_counter()
        _bind(composer, composer.compose(PROMPT).merged)
        cached.append((time.perf_counter() - start) * 1e3)
    result = {name: statistics.median(spent) for name, spent in stages.items()}
    result |= {"new_best": min(stages["new"]), "cached": statistics.median(cached)}
    return result | {
        "prompt_tokens": len(composer.model.tokenizer.encode(PROMPT)),
        "rank": float(_rank_of(composer, names)),
    }


def measure_decode(composer: Composer, gguf: Path, rounds: int, tokens: int = 32) -> dict[str, Any]:
    """Tokens a second of each contender, taking turns: the median over rounds, and ratios to llama.cpp."""
    ids = composer.model.tokenizer.encode(composer.model.tokenizer.chat([{"role": "user", "content": SHORT}]))
    weights = dict.fromkeys(_three(composer), 1 / 3)
    blend = composer.compose(SHORT, Request(weights=weights)).merged
    one = composer.compose(SHORT, Request(weights={next(iter(weights)): 1.0})).merged
    small = composer.compose(SHORT, Request(weights=weights, merge=MergeSettings("svd", energy=_ENERGY))).merged
    contenders = {
        "base_alone": _decoder_steps(composer, ids, MergedAdapter({}, "base")),
        "one_adapter": _decoder_steps(composer, ids, one),
        "three_adapters": _decoder_steps(composer, ids, blend),
        "three_adapters_svd": _decoder_steps(composer, ids, small),
    }
    blends = {"one_adapter": one, "three_adapters": blend}
    contenders |= _llama_contenders(gguf, ids, blends, composer.bundle.manifest.base)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            step()
            start = time.perf_counter()
            for _ in range(tokens):
                step()
            rates[name].append(tokens / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    merged = {"one_adapter": one, "three_adapters": blend, "three_adapters_svd": small}
    ranks = {name: max(m.rank for m in found.modules.values()) for name, found in merged.items()}
    result: dict[str, Any] = {"median": medians, "best": {n: max(v) for n, v in rates.items()}, "rank": ranks}
    result["slower_than_base_alone"] = {n: _ratio(rates["base_alone"], rates[n]) - 1 for n in merged}
    result["discarded_energy"] = small.report.discarded_energy
    if "llama_cpp_base_alone" in rates:
        ours = ("base_alone", "one_adapter", "three_adapters", "three_adapters_svd")
        same = {n: f"llama_cpp_{n.removesuffix('_svd')}" for n in ours}
        result["ratio_same_work"] = {n: _ratio(rates[n], rates[rival]) for n, rival in same.items()}
        result["ratio_to_llama_cpp_alone"] = {n: _ratio(rates[n], rates["llama_cpp_base_alone"]) for n in ours}
    return result


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of the ratio within a round, where both saw the same machine."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def measure_cold_start(bundle: Path, runs: int = 5) -> float:
    """Median seconds of `edgecompose run --json` on a short prompt, process start to answer."""
    command = [sys.executable, "-m", "edgecompose", "run", str(bundle), SHORT, "--json", "--device", "cpu"]
    spent = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    names = [x.partition(":")[2].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
        "onnxruntime": runtime_version(), "python": platform.python_version(),
    }  # fmt: skip


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    compose, decode = result["compose_ms"], result["decode_tokens_per_s"]
    same, alone = decode.get("ratio_same_work", {}), decode.get("ratio_to_llama_cpp_alone", {})
    print(f"compose, {compose['prompt_tokens']}-token prompt to three bound adapters {compose['new']:6.1f} ms")
    for stage in ("retrieve", "merge", "bind"):
        print(f"  of which {stage:41}{compose[stage]:8.2f} ms")
    print(f"compose, the same prompt again                    {compose['cached']:8.2f} ms")
    for name, rate in decode["median"].items():
        ratio = (
            f"   {same[name]:.2f} x llama.cpp at the same work, {alone[name]:.2f} x it alone" if name in same else ""
        )
        print(f"decode, {name:24}                  {rate:8.1f} tokens/s{ratio}")
    if not same:
        print("decode, llama.cpp: not measured (pip install llama-cpp-python, and give --gguf)")
    for name, share in decode["slower_than_base_alone"].items():
        print(f"decode, {name:22} rank {decode['rank'][name]:3}: {100 * share:5.1f} % slower than the base alone")
    print(f"cold start, process to answer                     {result['cold_start_s']:8.2f} s")


def _three(composer: Composer) -> list[str]:
    return sorted(composer.bundle.manifest.adapters)[:3]


def _rank_of(composer: Composer, names: list[str]) -> int:
    return sum(composer.adapter(name).rank for name in names)


def _bind(composer: Composer, merged: MergedAdapter) -> None:
    composer.model.decoder.start(merged, 256)


def _decoder_steps(composer: Composer, ids: list[int], merged: MergedAdapter) -> Step:
    decoding = composer.model.decoder.start(merged, 512)
    state = [int(decoding.forward(ids)[0].argmax())]

    def step() -> None:
        if decoding.length >= 500:
            decoding.rewind(len(ids))
        state[0] = int(decoding.forward(state)[0].argmax())

    return step


def _llama_contenders(gguf: Path, ids: list[int], blends: dict[str, MergedAdapter], base: BaseSpec) -> dict[str, Step]:
    """llama.cpp on the same GGUF, alone and with each blend; none when it cannot be measured."""
    if importlib.util.find_spec("llama_cpp") is None or not gguf.is_file():
        return {}
    contenders = {"llama_cpp_base_alone": _llama_steps(gguf, ids, None)}
    with tempfile.TemporaryDirectory() as folder:
        for name, merged in blends.items():
            lora = Path(folder) / f"{name}.gguf"
            write_gguf_lora(merged, lora, base)
            contenders[f"llama_cpp_{name}"] = _llama_steps(gguf, ids, lora)
    return contenders


def _llama_steps(gguf: Path, ids: list[int], lora: Path | None) -> Step:
    import llama_cpp

    threads = os.cpu_count()
    model = llama_cpp.Llama(
        str(gguf), n_threads=threads, n_threads_batch=threads, n_ctx=512, verbose=False,
        lora_path=None if lora is None else str(lora),
    )  # fmt: skip
    model.eval(ids)
    state = [model.sample(temp=0)]

    def step() -> None:
        if model.n_tokens >= 500:
            model.n_tokens = len(ids)
        model.eval(state)
        state[0] = model.sample(temp=0)

    return step


if __name__ == "__main__":
    main()
