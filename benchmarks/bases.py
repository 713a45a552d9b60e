"""Real bases: export, size, distance, speed and memory of each, against llama.cpp on the same GGUF.

    python benchmarks/bases.py qwen2.5-coder-0.5b-instruct FILE.gguf [--precisions source auto] [--only export|speed]
    python benchmarks/llama7b.py build/models/llama-2-7b-random
    python benchmarks/bases.py llama-2-7b-random --precisions int8 --rank 64

A base is a GGUF file, a Hugging Face folder, or the name of a folder below build/models. A fresh process exports it at
each precision; its time and peak memory are measured. Then the base decodes and reads, alone and with a blend of three
random adapters in all linear modules. llama.cpp (`pip install llama-cpp-python`) does the same, with the blend as its
LoRA file. Both take turns in the same processes. Decoding is greedy, 64 tokens after a prompt of 128. Reported are
medians over rounds, then over processes. Peak memory is that of a process which reads 128 tokens and writes 8, less the
size of its graph or GGUF file. Beside it stands the memory that is no page of a file: ONNX Runtime copies the weights
into the order that its kernels read, and the pages that it read them from count until the system takes them back.

Results go to benchmarks/results/bases.json after every step. The program keeps what is there, unless `--again`. It
prints a table of all that the file holds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found as a script, however edgecompose is installed

from benchmarks.footprint import Rival, run
from benchmarks.merge import random_adapter
from benchmarks.speed import PROMPT, Step, _has_llama, _llama, _llama_reading, _ratio, machine
from edgecompose.bundle.adapter import adapter_to_bytes, load_adapter
from edgecompose.bundle.manifest import BaseSpec
from edgecompose.bundle.records import value_from_json
from edgecompose.engine.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import MergeError
from edgecompose.formats.gguf import write_gguf_lora
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import MergeSettings

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "build" / "models"
RESULTS = ROOT / "benchmarks" / "results" / "bases.json"
ADAPTERS, LORA = 3, "blend.gguf"
PROMPT_TOKENS, TOKENS, READ_TOKENS, RUN_TOKENS = 128, 64, 256, 8
#: A process that does what `edgecompose run` does with its base and adapters, and nothing else.
_RUN = """
import json, os, sys
from pathlib import Path
from edgecompose.bundle.adapter import load_adapter
from edgecompose.engine.merged import MergedAdapter
from edgecompose.engine.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.bundle.manifest import BaseSpec
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import MergeSettings
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
    logits = state.forward([int(logits[0].argmax())])
resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
print((resident - of_files) * os.sysconf("SC_PAGE_SIZE") / 1e6)
"""


@dataclass(frozen=True)
class Source:
    """A base before its export: a GGUF file, or a Hugging Face folder, which llama.cpp cannot read."""

    name: str
    path: Path

    @property
    def gguf(self) -> Path | None:
        """The file for llama.cpp."""
        return self.path if self.path.suffix == ".gguf" else None

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        files = [self.path] if self.gguf else self.path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Exported:
    """A base after its export, and the random adapters that were made for it."""

    folder: Path
    spec: BaseSpec

    @classmethod
    def open(cls, folder: Path) -> Exported:
        """What `edgecompose-export base` wrote to a folder."""
        content = json.loads((folder / "base.json").read_text(encoding="utf-8"))
        return cls(folder, value_from_json(BaseSpec, content, "base.json"))

    def adapters(self, rank: int) -> Path:
        """Folder of the random adapters of a rank."""
        return self.folder / f"adapters-{rank}"

    @property
    def graph_bytes(self) -> int:
        """Size of the graph and its data."""
        graph = self.folder / self.spec.graph
        return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


@dataclass(frozen=True)
class Effort:
    """How much is measured: rank of each adapter, rounds in a process, processes."""

    rank: int
    rounds: int
    processes: int


def main() -> None:
    """Parse, measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="*", metavar="BASE", help="GGUF file, Hugging Face folder, or name")
    parser.add_argument("--precisions", nargs="+", default=["source", "auto"], help="those of edgecompose-export base")
    parser.add_argument("--only", choices=["export", "speed"], help="one of the two steps")
    parser.add_argument("--again", action="store_true", help="measure what the results hold already")
    parser.add_argument("--rank", type=int, default=16, help="of each of the three adapters")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=5, help="in which speed is measured")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bases", help="folder for exported bases")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=["adapters", "speed"], help=argparse.SUPPRESS)
    parser.add_argument("--gguf", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    effort = Effort(options.rank, options.rounds, options.processes)
    if options.worker == "adapters":
        write_adapters(Exported.open(options.work), effort.rank, options.gguf is not None)
    elif options.worker == "speed":
        print(json.dumps(speed_in_this_process(Exported.open(options.work), options.gguf, effort)))
    else:
        failed = measure(options, effort)
        print_table(_read(options.results))
        if failed:
            raise SystemExit("\n".join(failed))


def measure(options: argparse.Namespace, effort: Effort) -> list[str]:
    """Every step that is missing, each saved when it is done; what failed, a line each."""
    failed = []
    for source in map(find_source, options.bases):
        for precision in options.precisions:
            try:
                _measure_one(source, precision, options, effort)
            except SystemExit as error:  # other bases go on
                failed.append(f"{source.name} {precision} failed: {str(error).strip().splitlines()[-1]}")
                print(failed[-1], file=sys.stderr)
    return failed


def _measure_one(source: Source, precision: str, options: argparse.Namespace, effort: Effort) -> None:
    key, folder = f"{source.name} {precision}", options.work / f"{source.name}-{precision}"
    row = _read(options.results).get(key, {})
    rank = row.get("speed", {}).get("adapters", {}).get("rank")
    needs_speed = options.only != "export" and (options.again or rank != effort.rank)
    needs_export = options.only != "speed" and (options.again or "export" not in row)
    if needs_export or (needs_speed and not (folder / "base.json").is_file()):
        print(f"== {key}: exporting", file=sys.stderr)
        _save(options.results, key, {"export": measure_export(source, precision, folder)})
    if needs_speed:
        print(f"== {key}: speed and memory", file=sys.stderr)
        _save(options.results, key, {"speed": measure_speed(source, Exported.open(folder), effort)})


def find_source(text: str) -> Source:
    """A base by its path or its name below build/models.

    Raises:
        SystemExit: there is none.
    """
    path = Path(text) if Path(text).exists() else MODELS / text
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, path)
    if (path / "config.json").is_file():
        return Source(path.name, path)
    if len(files) == 1:
        return Source(path.name, files[0])
    raise SystemExit(
        f"'{text}' is not a GGUF file, and neither it nor build/models/{text} is a folder with config.json or exactly "
        "one GGUF file; give a path, or run: edgecompose-export fetch NAME -o build/models"
    )


# Export


def measure_export(source: Source, precision: str, folder: Path) -> dict[str, Any]:
    """Export in a fresh process; the largest of it and its children counts as its memory."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "edgecompose_export", "base", str(source.path), "--precision", precision]
    done = run([*command, "--accept-distance", "-o", str(folder)])
    spec = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    distance = spec.get("distance") or {}
    return {
        "seconds": done.seconds, "peak_mb": done.peak_mb, "precision": spec["precision"], "files": files,
        "mb": sum(files.values()) / 1e6, "source_mb": source.bytes / 1e6,
        "ratio_to_source": sum(files.values()) / source.bytes,
        "kl": distance.get("kl"), "top1": distance.get("top1"),
    }  # fmt: skip


# Speed and memory


def measure_speed(source: Source, exported: Exported, effort: Effort) -> dict[str, Any]:
    """Medians over processes, the range of the ratios, and peak memory."""
    gguf = source.gguf if source.gguf is not None and _has_llama(source.gguf) else None
    if not exported.adapters(effort.rank).is_dir():
        _worker("adapters", exported, gguf, effort)
    processes = [json.loads(_worker("speed", exported, gguf, effort)) for _ in range(effort.processes)]
    result: dict[str, Any] = {"processes": len(processes), "rounds": effort.rounds}
    if gguf is not None:
        result["llama_cpp_python"] = version("llama-cpp-python")
    for kind in ("decode", "read"):
        parts = [process[kind] for process in processes]
        result[kind] = {
            "tokens_per_s": {n: statistics.median(values) for n, values in _by_name(parts, "tokens_per_s").items()},
            "ratio": {n: _middle_and_range(values) for n, values in _by_name(parts, "ratio").items()},
        }
    adapters = {"count": ADAPTERS, "rank": effort.rank, "blend_rank": ADAPTERS * effort.rank}
    memory = measure_memory(exported, gguf, effort.rank)
    return {**result, "adapters": adapters, "memory": memory, "machine": machine(), "date": _today()}


def measure_memory(exported: Exported, gguf: Path | None, rank: int) -> dict[str, Any]:
    """Peak resident MB of a process that reads a prompt and writes 8 tokens, whole and less its model's files."""
    files = [str(path) for path in sorted(exported.adapters(rank).glob("*.safetensors"))]
    command = [sys.executable, "-c", _RUN, str(exported.folder), str(PROMPT_TOKENS)]
    commands = {"base_alone": command, "three_adapters": [*command, *files]}
    sizes = dict.fromkeys(commands, exported.graph_bytes / 1e6)
    if gguf is not None:
        lora = exported.adapters(rank) / LORA
        with_lora = Rival(gguf, lora).command(PROMPT_TOKENS)
        commands["llama_cpp_base_alone"] = [word if word != str(lora) else "" for word in with_lora]
        if lora.is_file():
            commands["llama_cpp_three_adapters"] = with_lora
        sizes |= {name: gguf.stat().st_size / 1e6 for name in commands if name not in sizes}
    done = {name: run(words) for name, words in commands.items()}
    return {
        "peak_mb": {name: process.peak_mb for name, process in done.items()},
        "beyond_files_mb": {name: process.peak_mb - sizes[name] for name, process in done.items()},
        "anonymous_beyond_files_mb": {n: float(p.output) - sizes[n] for n, p in done.items() if p.output},
    }


def _worker(kind: str, exported: Exported, gguf: Path | None, effort: Effort) -> str:
    """What this program writes as a process of its own; memory of one process is not that of another.

    Raises:
        SystemExit: it failed.
    """
    command = [
        sys.executable, __file__, "--worker", kind, "--work", str(exported.folder), "--rank", str(effort.rank),
        "--rounds", str(effort.rounds), *([] if gguf is None else ["--gguf", str(gguf)]),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process for {kind} failed: {done.stderr.strip()[-800:]}")
    return done.stdout


def write_adapters(exported: Exported, rank: int, for_llama: bool) -> None:
    """Three random adapters in 4 bits, and their blend as a LoRA file of llama.cpp where it has the architecture."""
    spec, target = exported.spec, exported.adapters(rank)
    with tempfile.TemporaryDirectory(dir=exported.folder) as name:
        folder = Path(name) / "adapters"
        folder.mkdir()
        for seed in range(ADAPTERS):
            modules = random_adapter(seed, spec.slots, rank, 4).modules
            content = adapter_to_bytes(modules, bits=4, base=spec.identity, source={"seed": seed})
            (folder / f"random{seed}.safetensors").write_bytes(content)
        if for_llama:
            try:
                write_gguf_lora(load_blend(spec, folder), folder / LORA, spec)
            except MergeError as error:
                print(f"llama.cpp runs without the blend: {error}", file=sys.stderr)
        folder.rename(target)


def load_blend(spec: BaseSpec, folder: Path) -> MergedAdapter:
    """The adapters of a folder merged at equal weights."""
    loaded = [load_adapter(path, path.stem, spec.slots, spec.identity) for path in sorted(folder.glob("*.safetensors"))]
    return Merger(choose_device("cpu")).merge(loaded, [1 / len(loaded)] * len(loaded), MergeSettings())


def speed_in_this_process(exported: Exported, gguf: Path | None, effort: Effort) -> dict[str, Any]:
    """Decoding and reading of every variant in turns, in this process."""
    spec, folder = exported.spec, exported.adapters(effort.rank)
    ids = (Tokenizer(exported.folder / spec.tokenizer).encode(PROMPT) * READ_TOKENS)[:READ_TOKENS]
    prompt = ids[:PROMPT_TOKENS]
    decoder = Decoder(exported.folder / spec.graph, spec, choose_device("cpu"))
    blends = {"base_alone": MergedAdapter({}, "base"), "three_adapters": load_blend(spec, folder)}
    decoding = {name: _decoding(decoder, blend, prompt) for name, blend in blends.items()}
    reading = {name: _reading(decoder, blend, ids) for name, blend in blends.items()}
    if gguf is not None:
        loras = {"base_alone": None, "three_adapters": folder / LORA}
        rivals = {n: _llama(gguf, lora) for n, lora in loras.items() if lora is None or lora.is_file()}
        decoding |= {f"llama_cpp_{name}": _llama_decoding(model, prompt) for name, model in rivals.items()}
        reading |= {f"llama_cpp_{name}": _llama_reading(model, ids) for name, model in rivals.items()}
    return {
        "decode": take_turns(decoding, TOKENS, effort.rounds), "read": take_turns(reading, READ_TOKENS, effort.rounds),
    }  # fmt: skip


def take_turns(variants: Mapping[str, Step], tokens: int, rounds: int) -> dict[str, Any]:
    """Median tokens a second of each, and the ratio of ours to llama.cpp's at the same work; the first round warms up.

    The ratio is the median of the ratios within a round, where both see the same machine.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, step in variants.items():
            start = time.perf_counter()
            step()
            if turn:
                rates[name].append(tokens / (time.perf_counter() - start))
    rivals = {name: f"llama_cpp_{name}" for name in rates if f"llama_cpp_{name}" in rates}
    return {
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {name: _ratio(rates[name], rates[rival]) for name, rival in rivals.items()},
    }


def _decoding(decoder: Decoder, blend: MergedAdapter, prompt: Sequence[int]) -> Step:
    state = decoder.start(blend, PROMPT_TOKENS + TOKENS)
    first = int(state.forward(prompt)[0].argmax())

    def write() -> None:
        state.rewind(len(prompt))
        token = first
        for _ in range(TOKENS):
            token = int(state.forward([token])[0].argmax())

    return write


def _reading(decoder: Decoder, blend: MergedAdapter, ids: Sequence[int]) -> Step:
    state = decoder.start(blend, len(ids))

    def read() -> None:
        state.rewind(0)
        state.forward(ids)[0].argmax()

    return read


def _llama_decoding(model: Any, prompt: Sequence[int]) -> Step:
    model.eval(prompt)
    first = model.sample(temp=0)

    def write() -> None:
        model.n_tokens, token = len(prompt), first
        for _ in range(TOKENS):
            model.eval([token])
            token = model.sample(temp=0)

    return write


def _by_name(parts: Sequence[Mapping[str, Any]], field: str) -> dict[str, list[float]]:
    """The values of a field in all processes, by variant."""
    return {name: [part[field][name] for part in parts] for name in parts[0][field]}


def _middle_and_range(values: Sequence[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


# Results


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _save(path: Path, key: str, part: dict[str, Any]) -> None:
    """Put a part of a row into the file."""
    rows = _read(path)
    rows[key] = rows.get(key, {}) | part
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def print_table(rows: Mapping[str, Any]) -> None:
    """All results for people; x is ours divided by llama.cpp's at the same work."""
    print("| base, precision | export s | peak MB | base MB | x source | KL | top-1 | adapters |", end="")
    print(" decode, x | with blend, x | read, x | with blend, x |", end="")
    print(" MB beyond files (no pages of files) | with blend | llama.cpp, both |")
    print("|---" * 15 + "|")
    for key, row in rows.items():
        print("| " + " | ".join([key, *_export_cells(row.get("export")), *_speed_cells(row.get("speed"))]) + " |")


def _export_cells(export: Mapping[str, Any] | None) -> list[str]:
    if export is None:
        return [""] * 6
    kl, top1 = export["kl"], export["top1"]
    return [
        f"{export['seconds']:.0f}", f"{export['peak_mb']:.0f}", f"{export['mb']:.0f}",
        f"{export['ratio_to_source']:.2f}", "" if kl is None else f"{kl:.5f}", "" if top1 is None else f"{top1:.1%}",
    ]  # fmt: skip


def _speed_cells(speed: Mapping[str, Any] | None) -> list[str]:
    if speed is None:
        return [""] * 8
    cells = [f"{speed['adapters']['count']} of rank {speed['adapters']['rank']}"]
    for kind in ("decode", "read"):
        for name in ("base_alone", "three_adapters"):
            ratio = speed[kind]["ratio"].get(name)
            rate = f"{speed[kind]['tokens_per_s'][name]:.1f}"
            cells.append(rate if ratio is None else f"{rate}, {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})")
    memory = speed["memory"]
    beyond, anonymous = memory["beyond_files_mb"], memory["anonymous_beyond_files_mb"]
    theirs = [f"{mb:.0f}" for name, mb in beyond.items() if name.startswith("llama_cpp_")]
    ours = [f"{beyond[name]:.0f} ({anonymous[name]:.0f})" for name in ("base_alone", "three_adapters")]
    return [*cells, *ours, ", ".join(theirs)]


if __name__ == "__main__":
    main()
