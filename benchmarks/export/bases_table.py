"""The results of `bases.py` for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def print_table(rows: Mapping[str, Any]) -> None:
    """All results as a table; x is ours divided by llama.cpp's at the same work."""
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
        f"{export['seconds']:.0f}",
        f"{export['peak_mb']:.0f}",
        f"{export['mb']:.0f}",
        f"{export['ratio_to_source']:.2f}",
        "" if kl is None else f"{kl:.5f}",
        "" if top1 is None else f"{top1:.1%}",
    ]


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
