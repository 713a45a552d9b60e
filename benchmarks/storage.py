"""What a stored bit buys: the error of an adapter's update for several ways to keep its LoRA factors.

    python benchmarks/storage.py PEFT_FOLDER... [--random RANK] [--base MODEL --prompts FILE.jsonl] [--save FILE]

For each PEFT folder (and a Gaussian adapter of the first one's shape with `--random`): bits a parameter, block scales
and tags included, and the Frobenius error of ΔW = B A relative to ΔW, both pooled over modules and layers. Forms:

* plain: the factors as trained. SVD: B A = U S V', kept as A' = S^1/2 V' and B' = U S^1/2.
* "int4", "int8": the bundle format, `edgecompose.quantization`; "rank k": only the k largest components.
* "uniform": blocks with half-integer codes and a searched float16 scale (1 bit is sign * mean).
* "LoRAQuant" (arXiv 2510.26690): SVD components up to the energy rho at some bits, the others at 1 bit or dropped;
  groups of 128. "rtn" rounds between a group's least and largest value; "fit" is "uniform"'s search, in place of the
  paper's gradient steps.
* "budget": bits chosen for each component by its error (Lagrangian over all modules), to an average.
* "unbiased": each coded row is stretched until its product with the row that it stands for is that row's own square
  (the least-squares scale shrinks an update); more error, and the scales take it in at no bits.
* "ladder": the same, but every module and layer has the same bits for its first component, its second, and so on.

With `--base` and `--prompts`, the mean KL divergence of the next token from the float adapter, for some of them, with
the chat template: at the answer's first token, and over all positions of the prompt. Prints tables, and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from edgecompose.bundle.quantization import Bits, QuantizedFactor, dequantize, quantize
from edgecompose_export.peft_source import WEIGHTS_FILE, read_config, scale_of

Float = npt.NDArray[np.float32]
_KEY = re.compile(r"^(?:base_model\.model\.)?(.*?\.(\d+)\..*?(\w+))\.lora_(A|B)\.weight$")
_GROUP = 128
_RHOS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_BUDGETS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
#: Where the KL divergence is measured.
_MEASURED = re.compile(
    r"plain int\d(, unbiased)?|SVD int4|SVD rank (2|4|8), int4|plain uniform [234], block (64|128), unbiased"
    r"|plain uniform [23], block 64|LoRAQuant [23]@0.9, rest 1, (rtn|fit|fit, unbiased)"
    r"|SVD ladder 4.5 of 0/2/4/8 bits, block 64|SVD budget (1.0|2.0|3.0|4.5), block 64|SVD budget .*, unbiased"
)
_SHRINKS = tuple(float(x) for x in np.linspace(1.0, 0.3, 15))
#: Header bits: a factor's float32 gain, a component's two 4-bit depths, a module's number of high components.
_GAIN, _DEPTH_TAGS, _SPLIT_TAG = 32, 8, 8


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Both factors of a module in all layers, rank-major: a (r, L, in), b (r, L, out) with the LoRA scale in it."""

    a: Float
    b: Float


Factors = Mapping[str, Pair]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """What a scheme gives back, and the bits that it takes."""

    scheme: str
    factors: Factors
    bits: float


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        divergence = Divergence(options.base, folder, tasks[name], options.limit) if name in tasks else None
        results[name] = measure(factors, divergence)
        print_table(name, results[name])
    line = json.dumps(results)
    if options.save:
        options.save.write_text(line + "\n", encoding="utf-8")
    print(line)


def measure(factors: Factors, divergence: Divergence | None) -> dict[str, Any]:
    """Bits a parameter, relative error and, where it is asked for, KL of every scheme; and the summary."""
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
    """One adapter's schemes by size, and what follows from them."""
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


def read_factors(folder: Path) -> dict[str, Pair]:
    """The factors of a PEFT folder whose layers have one rank."""
    config = read_config(folder)
    halves: dict[str, dict[int, Float]] = {}
    for key, tensor in load_file(folder / WEIGHTS_FILE).items():
        found = _KEY.match(key)
        if found is None:
            raise SystemExit(f"'{folder}' holds the tensor '{key}', which is no factor of a decoder layer")
        scale = scale_of(found[1], config) if found[4] == "B" else 1.0
        rows = tensor.T * scale if found[4] == "B" else tensor
        halves.setdefault(found[3] + found[4], {})[int(found[2])] = np.asarray(rows, np.float32)
    stacked = {key: np.stack([layers[i] for i in sorted(layers)], axis=1) for key, layers in halves.items()}
    return {name: Pair(stacked[name + "A"], stacked[name + "B"]) for name in sorted({key[:-1] for key in stacked})}


def random_factors(shape: Factors, rank: int) -> dict[str, Pair]:
    """Gaussian factors of the widths and layers of another adapter: no component stands out."""
    rng = np.random.default_rng(0)

    def draw(like: Float) -> Float:
        return rng.standard_normal((rank, *like.shape[1:]), dtype=np.float32)

    return {name: Pair(draw(pair.a), draw(pair.b)) for name, pair in shape.items()}


def svd_form(pair: Pair) -> Pair:
    """The same products, as orthogonal components in falling order, both factors of equal norm."""
    a, b = (x.astype(np.float64).transpose(1, 2, 0) for x in (pair.a, pair.b))
    qa, ra = np.linalg.qr(a)
    qb, rb = np.linalg.qr(b)
    u, s, vt = np.linalg.svd(rb @ ra.transpose(0, 2, 1))
    root = np.sqrt(s)[:, None, :]
    parts = (qa @ vt.transpose(0, 2, 1) * root, qb @ u * root)
    return Pair(*(np.ascontiguousarray(x.transpose(2, 0, 1), np.float32) for x in parts))


def squared_norm(pair: Pair) -> float:
    """|B A|² over all layers, without forming a product."""
    a, b = (x.astype(np.float64).transpose(1, 0, 2) for x in (pair.a, pair.b))
    return float(((a @ a.transpose(0, 2, 1)) * (b @ b.transpose(0, 2, 1))).sum())


def relative_error(factors: Factors, stored: Factors) -> float:
    """|B A - B^ A^| / |B A|, both pooled over modules and layers."""
    error = sum(
        squared_norm(Pair(np.concatenate([p.a, stored[name].a]), np.concatenate([p.b, -stored[name].b])))
        for name, p in factors.items()
    )
    return math.sqrt(max(error, 0.0) / sum(squared_norm(p) for p in factors.values()))


def component_energy(factors: Factors) -> list[float]:
    """Share of |ΔW|² in the first, second, ... singular component, over all modules and layers."""
    energy = np.sum([component_norms(svd_form(p)).sum(1) for p in factors.values()], axis=0)
    return [float(share) for share in energy / energy.sum()]


def component_norms(pair: Pair) -> npt.NDArray[np.float64]:
    """|b|² |a|² of each component, (r, L)."""
    return np.asarray(_dot(pair.a, pair.a) * _dot(pair.b, pair.b))


def _dot(left: Float, right: Float) -> npt.NDArray[np.float64]:
    return np.asarray(np.einsum("rln,rln->rl", left, right, dtype=np.float64))


def schemes(factors: Factors) -> Iterable[Stored]:
    """Every scheme of the table."""
    svd = {name: svd_form(pair) for name, pair in factors.items()}
    yield from _format_schemes(factors, svd)
    for block in (32, 64, 128):
        plain, components = Coded(factors, block, fitted), Coded(svd, block, fitted)
        for form, coded, given in (("plain", plain, factors), ("SVD", components, svd)):
            for bits in (1, 2, 3, 4):
                yield coded.stored(f"{form} uniform {bits}, block {block}", constant(given, bits), _no_tags)
        if block > 32:
            yield from _budget_schemes(plain, components, block)
    yield in_format("plain int4, unbiased", factors, 4, unbiased=True)
    yield from _unbiased_schemes(factors, svd)
    for label, coder in (("rtn", rounded), ("fit", fitted)):
        coded = Coded(svd, _GROUP, coder)
        for rho, high, low in itertools.product(_RHOS, (2, 3, 4), (0, 1, 2)):
            if low < 2 or high == 4:
                name = f"LoRAQuant {high}@{rho}, rest {low or 'dropped'}, {label}"
                yield coded.stored(name, split_by_energy(svd, rho, high, low), _split_tags)


def _format_schemes(factors: Factors, svd: Factors) -> Iterable[Stored]:
    """What a bundle can hold as it is."""
    rank = max(pair.a.shape[0] for pair in factors.values())
    depths: tuple[Bits, ...] = (8, 4)
    for bits in depths:
        yield in_format(f"plain int{bits}", factors, bits)
        yield in_format(f"SVD int{bits}", svd, bits)
        for kept in sorted({max(1, rank * part // 8) for part in (1, 2, 4, 6)}):
            cut = {name: Pair(pair.a[:kept], pair.b[:kept]) for name, pair in svd.items()}
            yield in_format(f"SVD rank {kept}, int{bits}", cut, bits)


def _budget_schemes(plain: Coded, components: Coded, block: int) -> Iterable[Stored]:
    """Bits for each component; a plain one is never dropped, for the others make up for it."""
    near = [(x, y) for x, y in itertools.product(range(1, 9), repeat=2) if abs(x - y) <= 1]
    for budget in _BUDGETS:
        yield components.within(f"SVD budget {budget}, block {block}", budget, [(0, 0), *near])
        if budget >= 1.5:
            yield plain.within(f"plain budget {budget}, block {block}", budget, near)
    for depths, budget in itertools.product(((0, 4), (0, 2, 4), (0, 2, 4, 8)), _BUDGETS):
        name = f"SVD budget {budget} of {'/'.join(map(str, depths))} bits, block {block}"
        yield components.within(name, budget, [(x, x) for x in depths])
    for label, depths in (("any", tuple(range(9))), ("0/2/4/8", (0, 2, 4, 8))):
        for budget in _BUDGETS:
            name = f"SVD ladder {budget} of {label} bits, block {block}"
            yield components.within(name, budget, [(x, x) for x in depths], ladder=True)


def _unbiased_schemes(factors: Factors, svd: Factors) -> Iterable[Stored]:
    """Some of the others with each row stretched to its own length along itself."""
    near = [(x, y) for x, y in itertools.product(range(1, 9), repeat=2) if abs(x - y) <= 1]
    for block in (64, 128):
        plain = Coded(factors, block, fitted, unbiased=True)
        for bits in (2, 3, 4):
            yield plain.stored(f"plain uniform {bits}, block {block}, unbiased", constant(factors, bits), _no_tags)
    components = Coded(svd, 128, fitted, unbiased=True)
    for budget in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5):
        yield components.within(f"SVD budget {budget}, block 128, unbiased", budget, [(0, 0), *near])
    grouped = Coded(svd, _GROUP, fitted, unbiased=True)
    for high in (2, 3):
        name = f"LoRAQuant {high}@0.9, rest 1, fit, unbiased"
        yield grouped.stored(name, split_by_energy(svd, 0.9, high, 1), _split_tags)


def in_format(scheme: str, factors: Factors, bits: Bits, *, unbiased: bool = False) -> Stored:
    """As the bundle format keeps it."""
    total, result = 0, {}
    for name, pair in factors.items():
        sides = [(side, quantize(side, bits)) for side in (pair.a, pair.b)]
        if unbiased:
            sides = [(side, _stretched(side, q)) for side, q in sides]
        total += sum(8 * (q.codes.nbytes + q.scales.nbytes) + _GAIN for _, q in sides)
        result[name] = Pair(*(dequantize(q) for _, q in sides))
    return Stored(scheme, result, total)


def _stretched(rows: Float, quantized: QuantizedFactor) -> QuantizedFactor:
    """The same codes under the scales that leave each row's length along itself as it was."""
    gain = _row_gain(rows, dequantize(quantized))
    return replace(quantized, scales=(quantized.scales * gain[..., None]).astype(np.float16))


def _row_gain(rows: Float, values: Float) -> npt.NDArray[np.float64]:
    overlap = _dot(rows, values)
    return np.where(overlap > 0, _dot(rows, rows) / np.where(overlap > 0, overlap, 1), 1)


def fitted(blocks: Float, bits: int) -> Float:
    """Half-integer codes under the scale with the least squared error, of a few; (..., block) to the values kept."""
    half = 2 ** (bits - 1)
    best, kept = np.full(blocks.shape[:-1], np.inf, np.float32), np.zeros_like(blocks)
    peaks = np.abs(blocks).max(-1, keepdims=True)
    for shrink in _SHRINKS if bits > 1 else (1.0,):
        steps = peaks * np.float32(shrink / half)
        codes = np.clip(np.floor(blocks / np.where(steps == 0, 1, steps)), -half, half - 1) + np.float32(0.5)
        fit = (blocks * codes).sum(-1, keepdims=True) / np.square(codes).sum(-1, keepdims=True)
        values = codes * _half_precision(fit)
        error = np.square(values - blocks).sum(-1)
        kept = np.where((error < best)[..., None], values, kept)
        best = np.minimum(error, best)
    return kept


def rounded(blocks: Float, bits: int) -> Float:
    """Round to nearest between the least and the largest value, zero being a code; 1 bit is sign * mean."""
    if bits == 1:
        signs = np.where(blocks < 0, np.float32(-1), np.float32(1))
        return np.asarray(signs * _half_precision(np.abs(blocks).mean(-1, keepdims=True)), np.float32)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    steps = _half_precision((high - low) / (2**bits - 1))
    steps = np.where(steps == 0, np.float32(1), steps)
    zero = np.rint(-low / steps)
    codes = np.clip(np.rint(blocks / steps) + zero, 0, 2**bits - 1)
    return np.asarray((codes - zero) * steps, np.float32)


def _half_precision(scales: Float) -> Float:
    """Through float16, with a common gain as in the bundle format."""
    gain = np.float32(np.abs(scales).max() or 1)
    return np.asarray((scales / gain).astype(np.float16).astype(np.float32) * gain, np.float32)


Choice = Mapping[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
"""Bits of each component's row of A and of B, both (r, L), by module; 0 drops the component."""


def constant(factors: Factors, bits: int) -> Choice:
    """The same bits everywhere."""
    return {name: (np.full(p.a.shape[:2], bits), np.full(p.a.shape[:2], bits)) for name, p in factors.items()}


def split_by_energy(factors: Factors, rho: float, high: int, low: int) -> Choice:
    """`high` bits for the fewest components of each module and layer that hold the share `rho` of |ΔW|²."""
    result = {}
    for name, pair in factors.items():
        energy = component_norms(pair)
        before = np.cumsum(energy, 0) - energy
        bits = np.where(before < rho * energy.sum(0), high, low)
        result[name] = (bits, bits)
    return result


def _no_tags(components: int, layers: int) -> int:
    return 0


def _split_tags(components: int, layers: int) -> int:
    return _SPLIT_TAG * layers


def _depth_tags(components: int, layers: int) -> int:
    return _DEPTH_TAGS * components * layers


class Coded:
    """Factors coded by one coder at every depth, so that schemes only choose."""

    def __init__(
        self, factors: Factors, block: int, coder: Callable[[Float, int], Float], *, unbiased: bool = False
    ) -> None:
        self._factors, self._block, self._coder, self._unbiased = factors, block, coder, unbiased
        self._kept: dict[tuple[str, int], Pair] = {}

    def stored(self, scheme: str, choice: Choice, tags: Callable[[int, int], int]) -> Stored:
        """The factors with the chosen bits."""
        total, result = 0, {}
        for name, pair in self._factors.items():
            a, b = np.zeros_like(pair.a), np.zeros_like(pair.b)
            for bits in {int(x) for chosen in choice[name] for x in np.unique(chosen)}:
                coded = self._at(name, bits)
                a[choice[name][0] == bits] = coded.a[choice[name][0] == bits]
                b[choice[name][1] == bits] = coded.b[choice[name][1] == bits]
            for side, chosen in ((a, choice[name][0]), (b, choice[name][1])):
                total += sum(self._row_bits(side.shape[2], int(x)) for x in chosen.ravel()) + _GAIN
            total += tags(*pair.a.shape[:2])
            result[name] = Pair(a, b)
        return Stored(scheme, result, total)

    def within(self, scheme: str, budget: float, options: Sequence[tuple[int, int]], *, ladder: bool = False) -> Stored:
        """Bits for each component out of `options` (of A, of B), least error with `budget` bits a parameter."""
        tables = {name: self._option_table(name, options) for name in self._factors}
        if ladder:
            shared = sum(error.sum(1, keepdims=True) for error, _ in tables.values())
            cost = sum(cost * error.shape[1] for error, cost in tables.values())
            tables = dict.fromkeys(tables, (shared, cost))
        components = 0 if ladder else sum(pair.a.shape[0] * pair.a.shape[1] for pair in self._factors.values())
        tags = _DEPTH_TAGS * components + 2 * _GAIN * len(self._factors)
        allowed = budget * sum(pair.a.size + pair.b.size for pair in self._factors.values()) - tags
        low, high = -60.0, 60.0  # log2 of the price of a bit
        for _ in range(60):
            price = (low + high) / 2
            chosen = {name: (error + 2.0**price * cost).argmin(-1) for name, (error, cost) in tables.items()}
            spent = [tables[name][1][index].sum() for name, index in chosen.items()]
            low, high = (price, high) if (spent[0] if ladder else sum(spent)) > allowed else (low, price)
        depths, choice = np.array(options), {}
        for name, (error, cost) in tables.items():
            bits = np.broadcast_to(depths[(error + 2.0**high * cost).argmin(-1)], (*self._factors[name].a.shape[:2], 2))
            choice[name] = (bits[..., 0], bits[..., 1])
        return self.stored(scheme, choice, _no_tags if ladder else _depth_tags)

    def _option_table(self, name: str, options: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
        """Squared error (r, L, options) of each component taken alone, over the mean; bits (options,)."""
        pair = self._factors[name]
        unit = sum(squared_norm(p) for p in self._factors.values()) / sum(p.a.shape[0] for p in self._factors.values())
        errors, costs = [], []
        products = component_norms(pair)
        for bits_a, bits_b in options:
            a, b = self._at(name, bits_a).a, self._at(name, bits_b).b
            mixed, own = _dot(pair.a, a) * _dot(pair.b, b), _dot(a, a) * _dot(b, b)
            errors.append((products - 2 * mixed + own) / unit)
            costs.append(self._row_bits(a.shape[2], bits_a) + self._row_bits(b.shape[2], bits_b))
        return np.stack(errors, -1), np.array(costs, np.float64)

    def _row_bits(self, width: int, bits: int) -> int:
        zeros = bits if self._coder is rounded and bits > 1 else 0
        return bits * width + math.ceil(width / self._block) * (16 + zeros) if bits else 0

    def _at(self, name: str, bits: int) -> Pair:
        if (name, bits) not in self._kept:
            pair = self._factors[name]
            self._kept[name, bits] = Pair(self._code(pair.a, bits), self._code(pair.b, bits))
        return self._kept[name, bits]

    def _code(self, rows: Float, bits: int) -> Float:
        """Blocks along n, the last one shorter where n asks for it."""
        if not bits:
            return np.zeros_like(rows)
        whole = rows.shape[2] // self._block * self._block
        parts = [rows[..., :whole].reshape(*rows.shape[:2], -1, self._block)] if whole else []
        parts += [rows[..., None, whole:]] if whole < rows.shape[2] else []
        values = np.concatenate([self._coder(part, bits).reshape(*rows.shape[:2], -1) for part in parts], axis=-1)
        return np.asarray(values * _row_gain(rows, values)[..., None], np.float32) if self._unbiased else values


def summarise(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The bundle format's int4 against the best of each family at equal bits, and at equal error."""
    own = rows["plain int4"]
    families = {
        "plain uniform": r"plain uniform.*\d$", "plain budget": r"plain budget", "SVD uniform": r"SVD uniform",
        "SVD budget, any bits": r"SVD budget [\d.]+, block \d+$", "SVD budget, 0/2/4/8": r"SVD budget.*/8",
        "SVD ladder, any bits": r"SVD ladder.*any", "SVD ladder, 0/2/4/8": r"SVD ladder.*/8",
        "SVD rank, int4": r"SVD rank.*int4", "SVD rank, int8": r"SVD rank.*int8",
        "LoRAQuant rtn": r"LoRAQuant.*rtn", "LoRAQuant fit": r"LoRAQuant.*fit$",
    }  # fmt: skip
    result = {}
    for family, pattern in families.items():
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


class Divergence:
    """KL of the next token between the float adapter and a stored one, on the base itself (transformers, PEFT)."""

    def __init__(self, base: Path, folder: Path, prompts: Path, limit: int) -> None:
        import torch
        from peft import PeftModel

        from edgecompose_export.base_source import open_base
        from edgecompose_export.checkpoint import load_model
        from edgecompose_export.train import base_tokenizer

        opened = open_base(base)
        tokenizer = base_tokenizer(opened)
        self._model = PeftModel.from_pretrained(load_model(opened), folder).eval()
        self._config = read_config(folder)
        lines = prompts.read_text(encoding="utf-8").split("\n")[:limit]
        texts = [tokenizer.chat([{"role": "user", "content": json.loads(x)["prompt"]}]) for x in lines if x.strip()]
        self._ids = [torch.tensor([tokenizer.encode(text)]) for text in texts]
        self._wanted = [self._logits(ids) for ids in self._ids]

    def of(self, factors: Factors) -> dict[str, float]:
        """Mean KL, in nats, at the answer's first token and over all positions; how often the likeliest token stays."""
        import torch

        with torch.no_grad():
            for path, module in self._model.named_modules():
                found = re.match(r"^base_model\.model\.(.*?\.(\d+)\..*?(\w+))$", path)
                if found and hasattr(module, "lora_A") and found[3] in factors:
                    pair, layer = factors[found[3]], int(found[2])
                    full = module.lora_A["default"].weight.shape[0]
                    a, b = (_padded(side[:, layer], full) for side in (pair.a, pair.b))
                    module.lora_A["default"].weight.copy_(torch.from_numpy(a))
                    module.lora_B["default"].weight.copy_(torch.from_numpy(b.T / scale_of(found[1], self._config)))
        answers, positions, same = [], [], []
        for ids, wanted in zip(self._ids, self._wanted, strict=True):
            found_logits = self._logits(ids)
            kl = (wanted.exp() * (wanted - found_logits)).sum(-1)
            answers.append(float(kl[-1]))
            positions.append(float(kl.mean()))
            same.append(float(wanted[-1].argmax() == found_logits[-1].argmax()))
        return {
            "kl_answer": float(np.mean(answers)), "kl_prompt": float(np.mean(positions)), "same": float(np.mean(same)),
        }  # fmt: skip

    def _logits(self, ids: Any) -> Any:
        import torch

        with torch.no_grad():
            return self._model(input_ids=ids).logits[0].float().log_softmax(-1)


def _padded(rows: Float, rank: int) -> Float:
    return np.concatenate([rows, np.zeros((rank - rows.shape[0], rows.shape[1]), np.float32)])


if __name__ == "__main__":
    main()
