"""Reads and writes LoRA adapters as quantised arrays.

File: safetensors. For each module `m` (q_proj, ...), the tensors `m.A.codes`, `m.A.scales`, `m.B.codes`,
`m.B.scales` (see `quantization`), `m.gains` (2,) float32, `m.scaling` (L,) float32, which is alpha/r or
alpha/sqrt(r) and 0 in layers that the adapter leaves alone, `m.ranks` (L,) int32, and `m.thresholds`
(2, 9, L) float32 (see `merging.sparsify`), which pruning would otherwise compute by sorting.
The metadata names the format, the bits, and the base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.quantization import BITS, Bits, QuantizedFactor, block_for, has_values_beyond, largest_magnitude
from edgecompose.bundle.records import depth_exceeds, named
from edgecompose.bundle.specs import LARGEST_WEIGHT, MOST_RANK, SlotGroup
from edgecompose.errors import AdapterError, SlotMismatch
from edgecompose.guard.tensors import metadata_of, tensors_of

Float = npt.NDArray[np.float32]
FORMAT = "edgecompose-adapter/3"
#: Densities whose pruning thresholds an adapter's file holds; those of others are computed by partial sorting.
DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: The largest magnitude of an entry of A or B: float16's, which no trained adapter comes near.
LARGEST_ENTRY = 65504.0
_DEEPEST_SOURCE = 16
_PARTS = ("A.codes", "A.scales", "B.codes", "B.scales", "gains", "scaling", "ranks", "thresholds")


@dataclass(frozen=True, slots=True, eq=False)
class AdapterModule:
    """Both factors of one module in all layers.

    `a` is (L, r, in), `b` is (L, r, out); `scaling` (L,) float32; `ranks` (L,) int32, rows beyond a
    layer's rank being zero; `thresholds` (2, 9, L) float32, of A and of B, as `sparsify.thresholds` gives them.
    """

    a: QuantizedFactor
    b: QuantizedFactor
    scaling: Float
    ranks: npt.NDArray[np.int32]
    thresholds: Float

    @property
    def rank(self) -> int:
        """Rows kept, the largest rank of any layer."""
        return self.a.rank

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.a.codes.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A named adapter. `base` is the identity of the base that it was exported against."""

    name: str
    modules: Mapping[str, AdapterModule]
    bits: Bits
    base: str
    digest: str

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules.values())


def adapter_to_bytes(modules: Mapping[str, AdapterModule], *, bits: Bits, base: str, source: dict[str, Any]) -> bytes:
    """The file of an adapter; the same input gives the same bytes.

    Raises:
        AdapterError: a value that is not finite or absurdly large, or ranks or thresholds that cannot be.
    """
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, module in modules.items():
        _check_values(f"module '{name}'", module)
        gains = np.array([module.a.gain, module.b.gain], np.float32)
        parts = (
            module.a.codes,
            module.a.scales,
            module.b.codes,
            module.b.scales,
            gains,
            module.scaling,
            module.ranks,
            module.thresholds,
        )
        tensors |= {f"{name}.{part}": np.ascontiguousarray(v) for part, v in zip(_PARTS, parts, strict=True)}
    metadata = {
        "format": FORMAT,
        "bits": str(bits),
        "base": base,
        "source": json.dumps(source, sort_keys=True),
    }
    from safetensors.numpy import save  # only writers need it

    return _canonical(bytes(save(tensors, metadata=metadata)))


def _canonical(content: bytes) -> bytes:
    """The same file with its header's keys sorted (safetensors writes the metadata in random order)."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def load_adapter(path: Path, name: str, groups: Iterable[SlotGroup], base: str) -> Adapter:
    """Read an adapter and check that it fits a base.

    Args:
        path: the file, whose hash the caller has checked.
        groups: the slots of the base.
        base: identity of the base.

    Raises:
        AdapterError: not an adapter file, or one that breaks the format.
        SlotMismatch: made for another base; lists every module that does not fit.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"adapter '{name}' cannot be read: {error}; export it again") from error
    return parse_adapter(content, name, groups, base)


def parse_adapter(content: bytes, name: str, groups: Iterable[SlotGroup], base: str) -> Adapter:
    """The adapter in the bytes of a file; arguments and errors are those of `load_adapter`."""
    tensors, metadata = tensors_of(content, f"adapter '{name}'", AdapterError)
    if metadata.get("format") != FORMAT or metadata.get("bits") not in [str(b) for b in BITS]:
        raise AdapterError(
            f"adapter '{name}' has the format {metadata.get('format')!r:.80}, expected {FORMAT!r}; "
            "make it with 'edgecompose-export adapter'"
        )
    bits = cast(Bits, int(metadata["bits"]))
    names = sorted({key.split(".", 1)[0] for key in tensors})
    stray = sorted(set(tensors) - {f"{module}.{part}" for module in names for part in _PARTS})
    if stray or not names:
        raise AdapterError(f"adapter '{name}' holds {', '.join(map(named, stray)) or 'no module'}; export it again")
    modules = {module: _module(name, module, tensors, bits) for module in names}
    _check_fit(name, modules, {g.name: g for g in groups}, metadata.get("base", ""), base)
    _check_source(name, metadata)
    digest = hashlib.sha256(content).hexdigest()
    return Adapter(name, modules, bits, metadata.get("base", ""), digest)


def adapter_metadata(path: Path) -> dict[str, str]:
    """Metadata of an adapter file without reading its tensors."""
    return metadata_of(path, f"adapter file '{path}'", AdapterError)


def _check_source(name: str, metadata: Mapping[str, str]) -> None:
    """Where an adapter comes from is an object of JSON, which goes into manifests."""
    try:
        source = json.loads(metadata.get("source", "{}"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"adapter '{name}': its source is no JSON ({error!s:.120}); export it again") from error
    if not isinstance(source, dict) or depth_exceeds(source, _DEEPEST_SOURCE):
        raise AdapterError(f"adapter '{name}': its source is no object of JSON, or a deep one; export it again")
    errors = source.get("errors", {})
    if not isinstance(errors, dict) or not all(type(e) in (int, float) and 0 <= e <= 1e12 for e in errors.values()):
        raise AdapterError(f"adapter '{name}': its source is no report of errors that are numbers; export it again")


def _module(adapter: str, module: str, tensors: Mapping[str, npt.NDArray[Any]], bits: Bits) -> AdapterModule:
    place = f"adapter '{adapter}', module '{named(module)}'"
    missing = [part for part in _PARTS if f"{module}.{part}" not in tensors]
    if missing:
        raise AdapterError(f"{place}: tensors missing: {', '.join(missing)}; export it again")
    a_codes, a_scales, b_codes, b_scales, gains, scaling, ranks, limits = (tensors[f"{module}.{p}"] for p in _PARTS)
    kind = np.float16 if bits == 16 else np.uint8
    expected = [
        (a_codes, kind, 3),
        (b_codes, kind, 3),
        (a_scales, np.float16, 3),
        (b_scales, np.float16, 3),
        (gains, np.float32, 1),
        (scaling, np.float32, 1),
        (ranks, np.int32, 1),
        (limits, np.float32, 3),
    ]
    if any(t.dtype != dtype or t.ndim != dims for t, dtype, dims in expected) or gains.shape != (2,):
        raise AdapterError(f"{place}: a tensor has another type or number of dimensions than the format says")
    layers = scaling.shape[0]
    outer = {t.shape[:2] for t in (a_codes, b_codes, a_scales, b_scales)}
    if outer != {(layers, a_codes.shape[1])} or ranks.shape != (layers,) or 0 in a_codes.shape:
        raise AdapterError(f"{place}: tensors disagree on rank or layers: {sorted(outer)}")
    for codes, scales in ((a_codes, a_scales), (b_codes, b_scales)):
        width = codes.shape[2] * (2 if bits == 4 else 1)
        if width == 0 or scales.shape[2] * block_for(width, bits) != width:
            raise AdapterError(f"{place}: {scales.shape[2]} scales do not fit a width of {width}")
    if limits.shape != (2, len(DENSITIES), layers):
        raise AdapterError(f"{place}: thresholds have shape {limits.shape}; export it again")
    a = QuantizedFactor(a_codes, a_scales, float(gains[0]), bits)
    b = QuantizedFactor(b_codes, b_scales, float(gains[1]), bits)
    loaded = AdapterModule(a, b, scaling, ranks, limits)
    _check_values(place, loaded)
    return loaded


def _check_values(place: str, module: AdapterModule) -> None:
    """Make sure that a module's numbers are what they mean: whatever is merged of them stays finite in float32."""
    for side, factor, limits in (("A", module.a, module.thresholds[0]), ("B", module.b, module.thresholds[1])):
        largest = largest_magnitude(factor)
        if not largest <= LARGEST_ENTRY:  # NaN is not
            raise AdapterError(
                f"{place}: a gain or code of {side} is not finite, or its values reach {largest:g}, "
                f"expected at most {LARGEST_ENTRY:g}; repair or retrain the adapter"
            )
        if not (np.abs(factor.scales) <= 1).all():
            raise AdapterError(f"{place}: a scale of {side} is beyond 1 or not finite; export it again")
        if not (limits[:-1] >= limits[1:]).all() or not (limits >= 0).all() or not np.isfinite(limits).all():
            raise AdapterError(f"{place}: thresholds of {side} are not finite, or not in order; export it again")
    if not (np.abs(module.scaling) <= LARGEST_WEIGHT).all():
        raise AdapterError(f"{place}: a scaling is not finite, or beyond {LARGEST_WEIGHT:g}; export it again")
    if module.rank > MOST_RANK or not ((module.ranks >= 0) & (module.ranks <= module.rank)).all():
        raise AdapterError(f"{place}: ranks are not in 0 to {min(module.rank, MOST_RANK)}; export it again")
    for layer in np.flatnonzero(module.ranks < module.rank):
        if any(has_values_beyond(factor, int(layer), int(module.ranks[layer])) for factor in (module.a, module.b)):
            raise AdapterError(f"{place}: layer {layer} has values beyond its rank; export it again")


def _check_fit(
    name: str, modules: Mapping[str, AdapterModule], groups: Mapping[str, SlotGroup], made_for: str, base: str
) -> None:
    problems = []
    for name_of_module, module in modules.items():
        group = groups.get(name_of_module)
        if group is None:
            problems.append(f"'{named(name_of_module)}' has no slot in this base")
        elif (module.layers, module.a.width, module.b.width) != (group.layers, group.n_in, group.n_out):
            problems.append(
                f"'{name_of_module}' is {group.layers} layers of {group.n_in}x{group.n_out} in this base, "
                f"{module.layers} layers of {module.a.width}x{module.b.width} in the adapter"
            )
    if problems:
        raise SlotMismatch(
            f"adapter '{name}' does not fit this base: {'; '.join(problems)}; export it against this base"
        )
    if made_for != base:
        raise SlotMismatch(
            f"adapter '{name}' was exported against base {made_for[:12]}…, this base is {base[:12]}…; "
            "export it against this base"
        )
