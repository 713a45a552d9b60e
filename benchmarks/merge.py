"""Merging against PEFT's `add_weighted_adapter`, on the same adapters in the same run.

    python benchmarks/merge.py --shapes smollm2-135m --adapters 4 --rank 16 --bits 4
    python benchmarks/merge.py --sweep --output benchmarks/results/2026-11-24-merge.json

The adapters are random; no base model is needed. PEFT gets the dequantised factors in float32 on modules without
weights. Times are the least of several rounds, ours and PEFT's taking turns. `again` merges adapters that were merged
before, with other weights: sessions are open, buffers are there, and what the weights do not enter is kept (trimmed
codes, Gram matrices, bases). `new` merges adapters never seen before. Ratios are PEFT's time over `again`. `floor` is
the time to read the quantised bytes once and to write the result once; `extra` is by how much the first round's peak of
resident memory exceeds the result, in a process of its own (--memory). Prints a table, ratios first, then JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecompose.bundle.adapter import Adapter, AdapterModule
from edgecompose.bundle.manifest import SlotGroup
from edgecompose.bundle.quantization import BITS, Bits, QuantizedFactor, dequantize, quantize
from edgecompose.engine.device import choose_device, runtime_version
from edgecompose.engine.merged import MergedAdapter
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import METHODS, MergeSettings
from edgecompose.merging.sparsify import thresholds

#: Layers, hidden, intermediate, key-value width.
SHAPES = {
    "smollm2-135m": (30, 576, 1536, 192),
    "llama-1b": (16, 2048, 8192, 512),
    "llama-8b": (32, 4096, 14336, 1024),
}
#: PEFT's method for each of ours that it has.
RIVALS = {
    "product": "cat", "linear": "linear", "ties": "ties", "magnitude_prune": "magnitude_prune",
    "dare_linear": "dare_linear", "dare_ties": "dare_ties", "svd": "svd",
}  # fmt: skip
DENSITY = 0.5
ROUNDS = 5
_SLOW = ("svd",)


def slot_groups(shapes: str, layers: int | None) -> tuple[SlotGroup, ...]:
    """The seven linear modules of a Llama of these shapes."""
    count, hidden, inner, narrow = SHAPES[shapes]
    count = layers or count
    widths = {
        "q_proj": (hidden, hidden), "k_proj": (hidden, narrow), "v_proj": (hidden, narrow), "o_proj": (hidden, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    return tuple(SlotGroup(name, count, *sizes) for name, sizes in widths.items())


def random_adapter(seed: int, groups: Sequence[SlotGroup], rank: int, bits: Bits) -> Adapter:
    """Random codes and scales."""
    rng = np.random.default_rng(seed)

    def factor(layers: int, width: int) -> QuantizedFactor:
        if bits == 16:
            return quantize(rng.random((layers, rank, width), np.float32) - np.float32(0.5), 16)
        codes = rng.integers(0, 256, (layers, rank, width if bits == 8 else width // 2), dtype=np.uint8)
        if bits == 8:
            codes = np.maximum(codes, 1)
        scales = (rng.random((layers, rank, width // 32)) + 0.5).astype(np.float16)
        return QuantizedFactor(codes, scales, 1e-3, bits)

    modules = {}
    for group in groups:
        a, b = factor(group.layers, group.n_in), factor(group.layers, group.n_out)
        scaling, ranks = np.full(group.layers, 2, np.float32), np.full(group.layers, rank, np.int32)
        modules[group.name] = AdapterModule(a, b, scaling, ranks, np.stack([thresholds(a), thresholds(b)]))
    return Adapter(f"a{seed}", modules, bits, "", f"{seed}-{rank}-{bits}")


def stored_bytes(adapters: Sequence[Adapter]) -> int:
    """Codes and scales of all adapters."""
    return sum(f.codes.nbytes + f.scales.nbytes for a in adapters for m in a.modules.values() for f in (m.a, m.b))


def least(run: Callable[[], object], rounds: int) -> float:
    """Milliseconds of the fastest round."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def floor_ms(adapters: Sequence[Adapter], merged: MergedAdapter) -> float:
    """Read the quantised bytes once, write the result once, into memory that is there already."""
    parts = [f.codes.reshape(-1) for a in adapters for m in a.modules.values() for f in (m.a, m.b)]
    words = [part[: part.size // 8 * 8].view(np.uint64) for part in parts]
    result = np.zeros(merged.bytes // 4, np.float32)

    def run() -> None:
        for part in words:
            part.max()
        result.fill(1.0)

    return least(run, ROUNDS)


def extra_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident set peaks above where it was, while `run` runs (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field}")


def peft_model(adapters: Sequence[Adapter], groups: Sequence[SlotGroup]) -> Any:
    """PEFT's LoRA layers with the dequantised factors, on linear modules whose weight takes no memory."""
    import peft
    import torch

    class Block(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for group in groups:
                linear = torch.nn.Linear(1, 1, bias=False)
                linear.in_features, linear.out_features = group.n_in, group.n_out
                weight = torch.empty(1).expand(group.n_out, group.n_in)
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                setattr(self, group.name, linear)

    class Stack(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Block() for _ in range(groups[0].layers))
            self.config: dict[str, Any] = {}

    model: Any = Stack()
    for adapter in adapters:
        config = peft.LoraConfig(r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules=[g.name for g in groups])
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter.name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=adapter.name)
        for group in groups:
            module = adapter.modules[group.name]
            a, b = dequantize(module.a), dequantize(module.b)
            for layer in range(group.layers):
                place = getattr(model.base_model.model.layers[layer], group.name)
                place.lora_A[adapter.name].weight.data = torch.from_numpy(a[layer].copy())
                place.lora_B[adapter.name].weight.data = torch.from_numpy(np.ascontiguousarray(b[layer].T))
    return model


def measure(case: dict[str, Any], methods: Sequence[str], *, rival: bool, slow_rival: bool) -> list[dict[str, Any]]:
    """One row a method."""
    groups = slot_groups(case["shapes"], case["layers"])
    adapters = [random_adapter(i, groups, case["rank"], case["bits"]) for i in range(case["adapters"])]
    model = peft_model(adapters, groups) if rival else None
    rows = []
    for method in methods:
        name = RIVALS.get(method)
        compared = model is not None and name is not None and (slow_rival or method not in _SLOW)
        rows.append(_measure_method(case, adapters, method, model if compared else None))
        print(_line(rows[-1]), flush=True)
    return rows


def _measure_method(case: dict[str, Any], adapters: Sequence[Adapter], method: str, model: Any) -> dict[str, Any]:
    weights = (np.arange(len(adapters), 0, -1) / sum(range(len(adapters) + 1))).tolist()
    merger, settings = Merger(choose_device(case["device"])), MergeSettings(method, DENSITY)
    count = iter(range(1000))

    def again() -> MergedAdapter:
        turn = next(count)
        return merger.merge(adapters, [w * (1 + 1e-3 * turn) for w in weights], settings)

    def fresh() -> MergedAdapter:
        turn = next(count)
        return merger.merge([replace(a, digest=f"{a.digest}-{turn}") for a in adapters], weights, settings)

    peak = extra_memory(again)
    merged = again()
    result, floor = merged.bytes, floor_ms(adapters, merged)
    del merged
    row = {**case, "method": method, "floor_ms": floor, "result_bytes": result, "stored_bytes": stored_bytes(adapters)}
    row["extra_bytes"] = None if peak is None else peak - result
    times, theirs = [], []
    for turn in range(ROUNDS):
        times.append(least(again, 2))
        if model is not None and (turn == 0 or method not in _SLOW):
            theirs.append(least(lambda: _peft_merge(model, adapters, weights, RIVALS[method], case["rank"]), 1))
    row |= {"ms": min(times), "new_ms": least(fresh, 3), "over_floor": min(times) / floor}
    if theirs:
        row |= {"rival_ms": min(theirs), "faster": min(theirs) / row["ms"], "faster_new": min(theirs) / row["new_ms"]}
    return row


def _peft_merge(model: Any, adapters: Sequence[Adapter], weights: Sequence[float], method: str, rank: int) -> None:
    names = [adapter.name for adapter in adapters]
    model.add_weighted_adapter(
        names, weights, "merged", combination_type=method, density=DENSITY, svd_rank=rank
    )  # fmt: skip
    model.delete_adapter("merged")


def memory_of(case: dict[str, Any], method: str) -> int | None:
    """Bytes beyond the result at the peak of a first merge, in a process of its own."""
    command = [sys.executable, __file__, "--method", method, "--no-rival"]
    for option in ("shapes", "layers", "adapters", "rank", "bits", "device"):
        command += [f"--{option}", str(case[option])]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(finished.stdout.splitlines()[-1])["rows"][0]["extra_bytes"]
    return None if found is None else int(found)


def _line(row: dict[str, Any]) -> str:
    faster = f"{row['faster']:7.1f}x" if "faster" in row else " " * 8
    rival = f"{row['rival_ms']:9.1f}" if "rival_ms" in row else " " * 9
    return (
        f"{faster}  {row['over_floor']:6.1f}x  {row['method']:16} {row['ms']:8.1f} {row['new_ms']:8.1f} {rival} "
        f"{row['floor_ms']:7.1f}  {row['result_bytes'] / 1e6:8.1f}  {row['shapes']}, {row['layers']} layers, "
        f"{row['adapters']} adapters of rank {row['rank']}, {row['bits']} bits"
    )


def cases(options: argparse.Namespace) -> list[tuple[dict[str, Any], list[str]]]:
    """What to measure, and with which methods."""
    case = {
        "shapes": options.shapes, "layers": options.layers or SHAPES[options.shapes][0], "adapters": options.adapters,
        "rank": options.rank, "bits": options.bits, "device": options.device,
    }  # fmt: skip
    if not options.sweep:
        return [(case, options.method or list(METHODS))]
    quick = ["product", "linear", "ties", "magnitude_prune"]
    varied: list[tuple[dict[str, Any], list[str]]] = [
        *(({"rank": rank}, quick) for rank in (8, 32, 64)),
        *(({"adapters": count}, quick) for count in (1, 2, 8, 16)),
        *(({"bits": bits}, quick) for bits in (8, 16)),
        ({"shapes": "llama-1b", "layers": 16}, quick),
        ({"shapes": "llama-1b", "layers": 1}, ["svd"]),
        ({"shapes": "llama-8b", "layers": 4}, quick),
    ]
    return [(case, list(METHODS)), *(({**case, **change}, methods) for change, methods in varied)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bits", type=int, choices=BITS, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu")
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--sweep", action="store_true", help="vary rank, adapters, bits and shapes")
    parser.add_argument("--no-rival", action="store_true", help="do not measure PEFT")
    parser.add_argument(
        "--memory", action="store_true", help="measure the peak of memory of the first case, in processes of their own"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    print("  faster  over floor  method              again      new      PEFT   floor  result MB")
    rows = []
    for i, (case, methods) in enumerate(cases(options)):
        slow_rival = case["layers"] == 1 or case["shapes"] == "smollm2-135m"
        measured = measure(case, methods, rival=not options.no_rival, slow_rival=slow_rival)
        for row in measured if options.memory and i == 0 else ():
            row["extra_bytes"] = memory_of(case, row["method"])
            extra = row["extra_bytes"]
            print(f"{row['method']:16} beyond the result: {'unknown' if extra is None else f'{extra / 1e6:.1f} MB'}")
        rows += measured
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "onnxruntime": runtime_version(), "rows": rows
    }  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
