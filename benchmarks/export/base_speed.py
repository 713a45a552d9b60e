"""Speed and memory of an exported base, alone and with a blend of random adapters, beside llama.cpp."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.export.bases import ADAPTERS, LORA, Exported, Source, load_blend
from benchmarks.measuring import decoders, llama
from benchmarks.measuring.llama import LlamaCpp
from benchmarks.measuring.machine import machine, today
from benchmarks.measuring.processes import run
from benchmarks.measuring.prompts import PROMPT
from benchmarks.measuring.timing import Step, median_ratio, medians, rates_in_turns
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.generation.tokenizer import Tokenizer

PROMPT_TOKENS, TOKENS, READ_TOKENS = 128, 64, 256
#: The script that runs as the worker process.
_SCRIPT = Path(__file__).resolve().parents[1] / "bases.py"
#: A process that does what `edgecompose run` does with its base and adapters, and nothing else.
_RUN = """
import json, os, sys
from pathlib import Path
from edgecompose.bundle.adapter import load_adapter
from edgecompose.engine.merged import MergedAdapter
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.bundle.specs import BaseSpec
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.bundle.records import value_from_json
base, tokens, adapters = Path(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]]
spec = value_from_json(BaseSpec, json.loads((base / "base.json").read_text("utf-8")), "base.json")
device = choose_device("cpu")
tokenizer, decoder = Tokenizer(base / spec.tokenizer), Decoder(base / spec.graph, spec, device)
blend = MergedAdapter({}, "base")
if adapters:
    loaded = [load_adapter(path, path.stem, spec.slots, spec.identity) for path in adapters]
    blend = Merger(device).merge(loaded, [1 / len(loaded)] * len(loaded), MergeSettings())
state = decoder.start(blend, 2048, reserve=tokens + 64)
logits = state.forward([265] * tokens)
for _ in range(8):
    logits = state.step([int(logits[0].argmax())])
resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
print((resident - of_files) * os.sysconf("SC_PAGE_SIZE") / 1e6)
"""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: rank of each adapter, rounds in a process, processes."""

    rank: int
    rounds: int
    processes: int


def measure_speed(source: Source, exported: Exported, effort: Effort) -> dict[str, Any]:
    """Medians over processes, the range of the ratios, and peak memory."""
    gguf = source.gguf if source.gguf is not None and llama.is_available(source.gguf) else None
    if not exported.adapters(effort.rank).is_dir():
        _worker("adapters", exported, gguf=gguf, effort=effort)
    processes = [json.loads(_worker("speed", exported, gguf=gguf, effort=effort)) for _ in range(effort.processes)]
    result: dict[str, Any] = {"processes": len(processes), "rounds": effort.rounds}
    if gguf is not None:
        result["llama_cpp_python"] = version("llama-cpp-python")
    for kind in ("decode", "read"):
        parts = [process[kind] for process in processes]
        ratios = _by_variant(parts, "ratio")
        result[kind] = {
            "tokens_per_s": medians(_by_variant(parts, "tokens_per_s")),
            "ratio": {n: [statistics.median(values), min(values), max(values)] for n, values in ratios.items()},
        }
    adapters = {"count": ADAPTERS, "rank": effort.rank, "blend_rank": ADAPTERS * effort.rank}
    memory = measure_memory(exported, gguf, effort.rank)
    return {**result, "adapters": adapters, "memory": memory, "machine": machine(), "date": today()}


def _by_variant(parts: Sequence[Mapping[str, Any]], field: str) -> dict[str, list[float]]:
    """The values of a field in all processes, by variant."""
    return {name: [part[field][name] for part in parts] for name in parts[0][field]}


def _worker(kind: str, exported: Exported, *, gguf: Path | None, effort: Effort) -> str:
    """Standard output of `bases.py` as a process of its own; the memory of one process is not that of another.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, str(_SCRIPT), "--worker", kind, "--work", str(exported.folder)]
    command += ["--rank", str(effort.rank), "--rounds", str(effort.rounds)]
    command += [] if gguf is None else ["--gguf", str(gguf)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process for {kind} failed: {done.stderr.strip()[-800:]}")
    return done.stdout


def measure_memory(exported: Exported, gguf: Path | None, rank: int) -> dict[str, Any]:
    """Peak resident MB of a process that reads a prompt and writes 8 tokens, whole and less its model's files."""
    files = [str(path) for path in sorted(exported.adapters(rank).glob("*.safetensors"))]
    command = [sys.executable, "-c", _RUN, str(exported.folder), str(PROMPT_TOKENS)]
    commands = {"base_alone": command, "three_adapters": [*command, *files]}
    sizes = dict.fromkeys(commands, exported.graph_bytes / 1e6)
    if gguf is not None:
        for name, setup in _llama_setups(gguf, exported.adapters(rank)).items():
            commands[name] = setup.command(PROMPT_TOKENS)
            sizes[name] = gguf.stat().st_size / 1e6
    done = {name: run(words) for name, words in commands.items()}
    return {
        "peak_mb": {name: process.peak_mb for name, process in done.items()},
        "beyond_files_mb": {name: process.peak_mb - sizes[name] for name, process in done.items()},
        "anonymous_beyond_files_mb": {n: float(p.output) - sizes[n] for n, p in done.items() if p.output},
    }


def speed_in_this_process(exported: Exported, gguf: Path | None, effort: Effort) -> dict[str, Any]:
    """DecoderState and reading of every variant in turns, in this process."""
    spec, folder = exported.spec, exported.adapters(effort.rank)
    ids = (Tokenizer(exported.folder / spec.tokenizer).encode(PROMPT) * READ_TOKENS)[:READ_TOKENS]
    prompt = ids[:PROMPT_TOKENS]
    decoder = Decoder(exported.folder / spec.graph, spec, choose_device("cpu"))
    blends = {"base_alone": MergedAdapter({}, "base"), "three_adapters": load_blend(spec, folder)}
    decoding = {name: decoders.answers(decoder, blend, prompt, tokens=TOKENS) for name, blend in blends.items()}
    reading = {name: decoders.readings(decoder, blend, ids) for name, blend in blends.items()}
    if gguf is not None:
        models = {name: setup.open() for name, setup in _llama_setups(gguf, folder).items()}
        decoding |= {name: llama.answers(model, prompt, tokens=TOKENS) for name, model in models.items()}
        reading |= {name: llama.readings(model, ids) for name, model in models.items()}
    return {
        "decode": take_turns(decoding, tokens=TOKENS, rounds=effort.rounds),
        "read": take_turns(reading, tokens=READ_TOKENS, rounds=effort.rounds),
    }


def _llama_setups(gguf: Path, adapters: Path) -> dict[str, LlamaCpp]:
    """llama.cpp alone, and with the blend if its LoRA file could be written."""
    setups = {"llama_cpp_base_alone": LlamaCpp(gguf)}
    if (adapters / LORA).is_file():
        setups["llama_cpp_three_adapters"] = LlamaCpp(gguf, adapters / LORA)
    return setups


def take_turns(variants: Mapping[str, Step], *, tokens: int, rounds: int) -> dict[str, Any]:
    """Median tokens a second of each, and the ratio of ours to llama.cpp's at the same work; one round warms up."""
    rates = rates_in_turns(variants, tokens=tokens, rounds=rounds, warm_up=1)
    pairs = {name: f"llama_cpp_{name}" for name in rates if f"llama_cpp_{name}" in rates}
    return {
        "tokens_per_s": medians(rates),
        "ratio": {name: median_ratio(rates[name], rates[theirs]) for name, theirs in pairs.items()},
    }
