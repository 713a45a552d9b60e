"""Bits against error: the error of an adapter's update for several ways to store its LoRA factors.

    python benchmarks/storage.py PEFT_FOLDER... [--random RANK] [--base MODEL --prompts FILE.jsonl] [--save FILE]

For each PEFT folder (and a Gaussian adapter of the first one's shape with `--random`): bits a parameter, block scales
and tags included, and the Frobenius error of ΔW = B A relative to ΔW, both pooled over modules and layers. Forms:

* plain: the factors as trained. SVD: B A = U S V', stored as A' = S^1/2 V' and B' = U S^1/2.
* "int4", "int8": the bundle format, `edgecompose.quantization`; "rank k": only the k largest components.
* "uniform": blocks with half-integer codes and a searched float16 scale (1 bit is sign * mean).
* "LoRAQuant" (arXiv 2510.26690): SVD components up to the energy rho at some bits, the others at 1 bit or dropped;
  groups of 128. "rtn" rounds between a group's least and largest value; "fit" is "uniform"'s search, in place of the
  paper's gradient steps.
* "budget": bits chosen for each component by its error (Lagrangian over all modules), to an average.
* "unbiased": each coded row is stretched until its product with the row that it stands for is that row's own square.
  The least-squares scale shrinks an update. This costs more error and no bits, since the scales hold the stretch.
* "ladder": as "budget", but every module and layer has the same bits for its first component, its second, and so on.

With `--base` and `--prompts`, some schemes get the mean KL divergence of the next token from the float adapter, with
the chat template: at the answer's first token, and over all positions of the prompt. Prints tables, and one JSON line.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.bundle.divergence import Divergence
from benchmarks.bundle.factors import Factors, Pair, component_energy, random_factors, read_factors, relative_error
from benchmarks.bundle.schemes import schemes
from benchmarks.measuring.arguments import command_parser
from benchmarks.measuring.results import write_result

#: Schemes whose KL divergence is measured.
_MEASURED = re.compile(
    r"plain int\d(, unbiased)?|SVD int4|SVD rank (2|4|8), int4|plain uniform [234], block (64|128), unbiased"
    r"|plain uniform [23], block 64|LoRAQuant [23]@0.9, rest 1, (rtn|fit|fit, unbiased)"
    r"|SVD ladder 4.5 of 0/2/4/8 bits, block 64|SVD budget (1.0|2.0|3.0|4.5), block 64|SVD budget .*, unbiased"
)
#: Families of schemes that the summary compares with the bundle format's int4, by their names.
_FAMILIES = {
    "plain uniform": r"plain uniform.*\d$",
    "plain budget": r"plain budget",
    "SVD uniform": r"SVD uniform",
    "SVD budget, any bits": r"SVD budget [\d.]+, block \d+$",
    "SVD budget, 0/2/4/8": r"SVD budget.*/8",
    "SVD ladder, any bits": r"SVD ladder.*any",
    "SVD ladder, 0/2/4/8": r"SVD ladder.*/8",
    "SVD rank, int4": r"SVD rank.*int4",
    "SVD rank, int8": r"SVD rank.*int8",
    "LoRAQuant rtn": r"LoRAQuant.*rtn",
    "LoRAQuant fit": r"LoRAQuant.*fit$",
}


def main() -> None:
    """Parse, measure, print."""
    parser = command_parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--random", type=int, metavar="RANK", help="a Gaussian adapter too")
    parser.add_argument("--base", type=Path, help="for the KL divergence: the base, a folder or a GGUF file")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="JSONL files, one for each of the folders")
    parser.add_argument("--limit", type=int, default=20, help="prompts of each file")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    adapters = {folder.name: read_factors(folder) for folder in options.folders}
    if options.random:
        shape = next(iter(adapters.values()))
        adapters[f"random-r{options.random}"] = random_factors(shape, options.random)
    tasks = dict(zip((f.name for f in options.folders), options.prompts, strict=False)) if options.base else {}
    results: dict[str, Any] = {}
    for (name, factors), folder in zip(adapters.items(), [*options.folders, None], strict=False):
        divergence = None
        if folder is not None and name in tasks:
            divergence = Divergence(options.base, folder, prompts=tasks[name], limit=options.limit)
        results[name] = measure(factors, divergence)
        print_table(name, results[name])
    if options.save:
        write_result(options.save, results)
    print(json.dumps(results))


def measure(factors: Factors, divergence: Divergence | None) -> dict[str, Any]:
    """Bits a parameter and relative error of every scheme, KL of some; and the summary."""
    rows: dict[str, dict[str, float]] = {}
    parameters = sum(pair.a.size + pair.b.size for pair in factors.values())
    for stored in schemes(factors):
        row = {"bits": stored.bits / parameters, "error": relative_error(factors, stored.factors)}
        if divergence and _MEASURED.fullmatch(stored.scheme):
            row |= divergence.of(stored.factors)
        rows[stored.scheme] = row
    if divergence:
        empty = {name: Pair(np.zeros_like(p.a), np.zeros_like(p.b)) for name, p in factors.items()}
        rows["no adapter"] = {"bits": 0.0, "error": 1.0, **divergence.of(empty)}
    return {"rows": rows, "energy": component_energy(factors), "summary": summarise(rows)}


def print_table(name: str, result: Mapping[str, Any]) -> None:
    """One adapter's schemes by size, and the summary."""
    energy = " ".join(f"{100 * share:.1f}" for share in result["energy"])
    print(f"\n{name}: share of |ΔW|² in the singular components, %: {energy}")
    print(f"{'scheme':44}{'bits':>7}{'error':>9}{'KL answer':>11}{'KL prompt':>11}   * no other is smaller and better")
    best = math.inf
    for scheme, row in sorted(result["rows"].items(), key=lambda item: (item[1]["bits"], item[1]["error"])):
        kl = "".join(f"{row[key]:11.2e}" if key in row else " " * 11 for key in ("kl_answer", "kl_prompt"))
        print(f"{scheme:44}{row['bits']:7.3f}{row['error']:9.4f}{kl:22}{' *' if row['error'] < best else ''}")
        best = min(best, row["error"])
    for key, value in result["summary"].items():
        print(f"{key}: {value:.3f}")


def summarise(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The bundle format's int4 against the best of each family at equal bits, and at equal error."""
    own = rows["plain int4"]
    result = {}
    for family, pattern in _FAMILIES.items():
        points = sorted((row["bits"], row["error"]) for name, row in rows.items() if re.match(pattern, name))
        front = [p for i, p in enumerate(points) if p[1] < min((q[1] for q in points[:i]), default=math.inf)]
        bits, falls = [p[0] for p in front], [-math.log(p[1]) for p in front]
        if bits[0] <= own["bits"] <= bits[-1]:
            at_bits = math.exp(-float(np.interp(own["bits"], bits, falls)))
            result[f"{family}: error at int4's bits over int4's error"] = at_bits / own["error"]
        if falls[0] <= -math.log(own["error"]) <= falls[-1]:
            result[f"{family}: bits a parameter at int4's error"] = float(
                np.interp(-math.log(own["error"]), falls, bits)
            )
    return result


if __name__ == "__main__":
    main()
