"""Speed and memory of the whole way on this machine, against llama.cpp on the same GGUF.

    python benchmarks/speed.py models/demo [--gguf FILE] [--save DIR]

Composing, decoding and reading prompts (tokens a second), time to the first token, cold start, peak memory, growth over
1,000 requests, and the server under several clients. llama.cpp is measured when `llama-cpp-python` is installed
(`pip install llama-cpp-python` compiles it in some minutes). Our decoder and llama.cpp take turns, round by round, in
one process with the same number of threads, so that both see the same machine. llama.cpp runs alone, and with the very
blends that we run, written as its LoRA files: the same work, and the ratio to look at. Where pages happen to lie moves
that ratio by up to a tenth from process to process, so decoding is measured in several; the median counts. Prints a
table, and one JSON line last.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found as a script, however edgecompose is installed

from benchmarks.footprint import LENGTHS
from benchmarks.server_load import measure_server
from edgecompose import Composer, MergeSettings, Request, open_bundle
from edgecompose.bundle.files import read_manifest
from edgecompose.bundle.manifest import BaseSpec
from edgecompose.engine.device import runtime_version
from edgecompose.engine.merged import MergedAdapter
from edgecompose.formats.gguf import write_gguf_lora

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
    parser.add_argument("--name", default="speed", help="name of that file")
    parser.add_argument("--processes", type=int, default=5, help="in which decoding is measured")
    parser.add_argument("--only-decode", action="store_true", help="one process of those; prints its JSON")
    options = parser.parse_args()
    if options.only_decode:
        print(json.dumps(measure_decode(options.bundle, options.gguf, options.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.bundle, options.gguf, options.rounds, options.processes, Path(folder))
    print_table(result)
    line = json.dumps(result)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / f"{result['date']}-{options.name}.json").write_text(line + "\n", encoding="utf-8")
    print(line)


def measure(bundle: Path, gguf: Path, rounds: int, processes: int, folder: Path) -> dict[str, Any]:
    """Everything.

    Args:
        folder: for LoRA files.
    """
    with open_bundle(bundle, device="cpu") as composer:
        blends = _blends(composer, _three(composer))
        loras = _write_loras(blends, composer.bundle.manifest.base, folder) if _has_llama(gguf) else {}
    command = [sys.executable, str(Path(__file__).with_name("footprint.py")), str(bundle), "--prompt", PROMPT]
    if loras:
        command += ["--gguf", str(gguf), "--lora", str(loras["three_adapters"])]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = {**json.loads(finished.stdout), "server": measure_server(bundle)}
    result["decode_tokens_per_s"] = decode_in_processes(bundle, gguf, rounds, processes)
    with open_bundle(bundle, device="cpu") as composer:
        composer.warm_up()
        result |= {
            "compose_ms": measure_compose(composer),
            "prefill_tokens_per_s": measure_prefill(composer, gguf, loras, max(3, rounds // 4)),
            "first_token_ms": measure_first_token(composer),
        }
    distance = read_manifest(bundle).base.distance
    return result | {
        "base": {"precision": read_manifest(bundle).base.precision, "kl": None if distance is None else distance.kl},
        "machine": machine(), "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


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
        "prompt_tokens": len(composer.model.tokenizer.encode_prompt(PROMPT)),
        "rank": float(_rank_of(composer, names)),
    }


def decode_in_processes(bundle: Path, gguf: Path, rounds: int, processes: int) -> dict[str, Any]:
    """Medians over fresh processes of what `measure_decode` finds in each, and how far the ratios lie apart."""
    command = [sys.executable, __file__, str(bundle), "--gguf", str(gguf), "--rounds", str(rounds), "--only-decode"]
    found = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(max(1, processes))
    ]
    result: dict[str, Any] = {"processes": len(found), "rank": found[0]["rank"]}
    for part in ("median", "slower_than_base_alone", "ratio_same_work", "ratio_to_llama_cpp_alone"):
        if part in found[0]:
            result[part] = {n: statistics.median(one[part][n] for one in found) for n in found[0][part]}
    if "ratio_same_work" in found[0]:
        names = found[0]["ratio_same_work"]
        result["ratio_same_work_range"] = {
            n: (min(one["ratio_same_work"][n] for one in found), max(one["ratio_same_work"][n] for one in found))
            for n in names
        }  # fmt: skip
    return result | {"discarded_energy": found[0]["discarded_energy"]}


def measure_decode(bundle: Path, gguf: Path, rounds: int, tokens: int = 32) -> dict[str, Any]:
    """Tokens a second of each contender, taking turns: the median over rounds, and ratios to llama.cpp."""
    with open_bundle(bundle, device="cpu") as composer, tempfile.TemporaryDirectory() as folder:
        ids = composer.model.tokenizer.encode(composer.model.tokenizer.chat([{"role": "user", "content": SHORT}]))
        blends = _blends(composer, _three(composer))
        contenders = {name: _decoder_steps(composer, ids, merged) for name, merged in blends.items()}
        if _has_llama(gguf):
            loras = _write_loras(blends, composer.bundle.manifest.base, Path(folder))
            rivals: dict[str, Path | None] = {"base_alone": None, **loras}
            contenders |= {f"llama_cpp_{n}": _llama_steps(_llama(gguf, lora), ids) for n, lora in rivals.items()}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            step()
            start = time.perf_counter()
            for _ in range(tokens):
                step()
            rates[name].append(tokens / (time.perf_counter() - start))
    ranks = {name: max((m.rank for m in found.modules.values()), default=0) for name, found in blends.items()}
    result: dict[str, Any] = {"rank": ranks, **_summary(rates)}
    result["slower_than_base_alone"] = {n: _ratio(rates["base_alone"], rates[n]) - 1 for n in blends if ranks[n]}
    result["discarded_energy"] = blends["three_adapters_svd"].report.discarded_energy
    return result


def measure_prefill(composer: Composer, gguf: Path, loras: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Tokens a second at which prompts are read, and the first token of the answer found, by number of tokens."""
    blends = _blends(composer, _three(composer))
    result: dict[str, Any] = {}
    for length in LENGTHS:
        ids = composer.model.tokenizer.encode(PROMPT * 40)[:length]
        contenders = {name: _reading(composer, merged, ids) for name, merged in blends.items()}
        if _has_llama(gguf):
            rivals = {"base_alone": None, **loras}
            contenders |= {f"llama_cpp_{n}": _llama_reading(_llama(gguf, lora), ids) for n, lora in rivals.items()}
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(rounds + 1):
            for name, read in contenders.items():
                start = time.perf_counter()
                read()
                if turn:
                    rates[name].append(length / (time.perf_counter() - start))
        result[str(length)] = _summary(rates)
    return result


def measure_first_token(composer: Composer, runs: int = 15) -> dict[str, float]:
    """Median milliseconds from a prompt never seen before to the first piece of its answer, all parts loaded.

    Embedding, retrieval, the merge of what was found, and the reading of the prompt, by its number of tokens.
    """
    result = {}
    for length in LENGTHS:
        words = composer.model.tokenizer.encode(PROMPT * 40)[8 - length :]
        spent = []
        for turn in range(runs + 1):
            prompt = f"{turn} {composer.model.tokenizer.decode(words)}"
            start = time.perf_counter()
            with composer.generate(prompt, Request(max_tokens=2)) as generation:
                next(iter(generation), None)
                spent.append((time.perf_counter() - start) * 1e3)
        result[str(length)] = statistics.median(spent[1:])
    return result


def _summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and bests of all contenders, and ours against llama.cpp at the same work and without any adapter."""
    result: dict[str, Any] = {
        "median": {name: statistics.median(values) for name, values in rates.items()},
        "best": {name: max(values) for name, values in rates.items()},
    }
    if "llama_cpp_base_alone" in rates:
        same = {n: f"llama_cpp_{n.removesuffix('_svd')}" for n in rates if not n.startswith("llama_cpp_")}
        result["ratio_same_work"] = {n: _ratio(rates[n], rates[rival]) for n, rival in same.items()}
        result["ratio_to_llama_cpp_alone"] = {n: _ratio(rates[n], rates["llama_cpp_base_alone"]) for n in same}
    return result


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of the ratio within a round, where both saw the same machine."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


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
    print(f"compose, {compose['prompt_tokens']}-token prompt to three bound adapters {compose['new']:6.1f} ms")
    for stage in ("retrieve", "merge", "bind"):
        print(f"  of which {stage:41}{compose[stage]:8.2f} ms")
    print(f"compose, the same prompt again                    {compose['cached']:8.2f} ms")
    _print_rates(f"decode ({decode['processes']} processes)", decode)
    for name, (low, high) in decode.get("ratio_same_work_range", {}).items():
        print(f"decode, {name:22} {low:.2f} to {high:.2f} x llama.cpp at the same work")
    for name, share in decode["slower_than_base_alone"].items():
        print(f"decode, {name:22} rank {decode['rank'][name]:3}: {100 * share:5.1f} % slower than the base alone")
    for length, found in result["prefill_tokens_per_s"].items():
        _print_rates(f"read {length}", found)
    for length, spent in result["first_token_ms"].items():
        print(f"prompt of {length:>4} tokens to first piece, composed anew {spent:8.1f} ms")
    for name, seconds in result["cold_start_s"].items():
        print(f"cold start, {name:37} {seconds:8.2f} s")
    memory = result["peak_memory_mb"]
    print(f"graphs of the bundle {memory['graphs']:.0f} MB; peak memory of `retrieve` {memory['retrieve']:.0f} MB")
    for name in ("retrieved", "three_adapters", "llama_cpp"):
        for length, peak in memory[name].items():
            print(f"peak memory, {name:15} {length:>4} tokens {peak:6.0f} MB (wanted {memory['allowed']:.0f})")
    resident = ", ".join(f"{n}: {mb:.0f} MB" for n, mb in result["resident_mb_after_requests"].items())
    print(f"resident memory after requests: {resident}")
    for clients, load in result["server"].items():
        print(
            f"server, {clients} clients: p50 {1e3 * load['p50_s']:.0f} ms, p99 {1e3 * load['p99_s']:.0f} ms, "
            f"{load['calls_per_s']:.1f} calls/s, {load['tokens_per_s']:.0f} tokens/s"
        )


def _print_rates(what: str, found: dict[str, Any]) -> None:
    same, alone = found.get("ratio_same_work", {}), found.get("ratio_to_llama_cpp_alone", {})
    for name, rate in found["median"].items():
        ratio = (
            f"   {same[name]:.2f} x llama.cpp at the same work, {alone[name]:.2f} x it alone" if name in same else ""
        )
        print(f"{f'{what}, {name}':46} {rate:8.1f} tokens/s{ratio}")
    if not same:
        print(f"{what}, llama.cpp: not measured (pip install llama-cpp-python, and give --gguf)")


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


def _reading(composer: Composer, merged: MergedAdapter, ids: list[int]) -> Step:
    decoding = composer.model.decoder.start(merged, len(ids) + 1)

    def read() -> None:
        decoding.rewind(0)
        decoding.forward(ids)[0].argmax()

    return read


def _blends(composer: Composer, names: list[str]) -> dict[str, MergedAdapter]:
    """No adapter, one, three, and three cut to the rank that keeps most of their energy."""
    weights = dict.fromkeys(names, 1 / 3)
    requests = {
        "one_adapter": Request(weights={names[0]: 1.0}),
        "three_adapters": Request(weights=weights),
        "three_adapters_svd": Request(weights=weights, merge=MergeSettings("svd", energy=_ENERGY)),
    }
    merged = {name: composer.compose(SHORT, request).merged for name, request in requests.items()}
    return {"base_alone": MergedAdapter({}, "base"), **merged}


def _has_llama(gguf: Path) -> bool:
    return importlib.util.find_spec("llama_cpp") is not None and gguf.is_file()


def _write_loras(blends: dict[str, MergedAdapter], base: BaseSpec, folder: Path) -> dict[str, Path]:
    """The blends of one and of three adapters as LoRA files of llama.cpp."""
    names = ("one_adapter", "three_adapters")
    return {name: write_gguf_lora(blends[name], folder / f"{name}.gguf", base) for name in names}


def _llama(gguf: Path, lora: Path | None) -> Any:
    import llama_cpp

    threads = os.cpu_count()
    return llama_cpp.Llama(
        str(gguf), n_threads=threads, n_threads_batch=threads, n_ctx=1100, verbose=False,
        lora_path=None if lora is None else str(lora),
    )  # fmt: skip


def _llama_steps(model: Any, ids: list[int]) -> Step:
    model.eval(ids)
    state = [model.sample(temp=0)]

    def step() -> None:
        if model.n_tokens >= 500:
            model.n_tokens = len(ids)
        model.eval(state)
        state[0] = model.sample(temp=0)

    return step


def _llama_reading(model: Any, ids: list[int]) -> Step:
    def read() -> None:
        model.reset()
        model.eval(ids)
        model.sample(temp=0)

    return read


if __name__ == "__main__":
    main()
