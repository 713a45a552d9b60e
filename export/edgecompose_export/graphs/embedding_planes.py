"""An embedding that shares no bytes with the output layer, in planes: low bits, high bits, scales and offsets.

The graph gathers the rows of all planes and computes their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from edgecompose_export.graphs.writer import DataFile, GraphWriter
from edgecompose_export.weights.blocks import BlockForm, packed
from edgecompose_export.weights.forms import read_form, row_chunks
from edgecompose_export.weights.gguf_blocks import GGUF_FORMS
from edgecompose_export.weights.places import EMBEDDING
from edgecompose_export.weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class _Layout:
    """Planes of a code: its low 4 bits and `high_bits` planes of one bit, or whole bytes where `high_bits` is 4."""

    high_bits: int
    half_scales: bool = False

    @property
    def bit_planes(self) -> range:
        """The bits of a code that have a plane each."""
        return range(4, 4 + self.high_bits if self.high_bits < 4 else 4)


#: Layouts of block types whose codes, less their smallest value, have few bits, or whose scales are float16.
_LAYOUTS: Mapping[str, _Layout] = {
    "Q4_0": _Layout(0, half_scales=True),
    "Q4_1": _Layout(0),
    "Q4_K": _Layout(0),
    "Q2_K": _Layout(0),
    "Q3_K": _Layout(0),
    "Q5_0": _Layout(1, half_scales=True),
    "Q5_1": _Layout(1),
    "Q5_K": _Layout(1),
    "Q6_K": _Layout(2),
    "Q8_0": _Layout(4, half_scales=True),
    "IQ4_NL": _Layout(4, half_scales=True),
    "IQ4_XS": _Layout(4),
}
#: Smallest code of the types whose codes do not begin at 0.
_LOWEST: Mapping[str, int] = {"Q5_0": 112, "Q5_1": 112, "Q5_K": 112, "Q6_K": 96}


class EmbeddingPlanes:
    """The planes of a base's embedding in one block form.

    Args:
        form: the form of the file, whose layout is then used, or another one.
    """

    def __init__(self, source: WeightSource, form: BlockForm) -> None:
        kind = source.type_of(EMBEDDING)
        native = GGUF_FORMS.get(kind) == form
        self._source, self._form = source, form
        self._layout = _LAYOUTS[kind] if native else _Layout(4 if form.bits == 8 else 0)
        self._lowest = _LOWEST.get(kind, 0) if native else 0
        self._rows, self._width = source.shape(EMBEDDING)
        self._planes = self._described()

    @property
    def values(self) -> int:
        """Number of weights."""
        return self._rows * self._width

    def reserve(self, data: DataFile) -> None:
        """Make room for all planes."""
        for part, dtype, size in self._planes:
            data.reserve(f"embedding.{part}", dtype, (self._rows, size))

    def write(self, data: DataFile) -> Iterator[int]:
        """Write all planes a few rows at a time; yield the number of weights of each step."""
        ends = dict.fromkeys((part for part, _, _ in self._planes), 0)
        for start, stop in row_chunks((self._rows, self._width)):
            planes = self._computed(start, stop)
            for part in ends:
                ends[part] = data.write(f"embedding.{part}", planes[part], ends[part])
            yield (stop - start) * self._width

    def lookup(self, graph: GraphWriter, data: DataFile, ids: str) -> str:
        """Nodes that give the embeddings (batch, s, width) of token ids (batch, s)."""
        parts = {
            part: graph.node(
                "Gather", [graph.tensor(data.tensors[f"embedding.{part}"]), ids], f"embedding/{part}", axis=0
            )
            for part, _, _ in self._planes
        }
        codes = _whole_codes(graph, parts, self._layout)
        return self._values(graph, codes, parts)

    def _described(self) -> list[tuple[str, str, int]]:
        """Name, type and width of each plane."""
        blocks = -(-self._width // self._form.block)
        whole = blocks * self._form.block
        planes = [("codes", "uint8", whole if self._layout.high_bits == 4 else whole // 2)]
        planes += [(f"bit{bit}", "uint8", whole // 8) for bit in self._layout.bit_planes]
        planes.append(("scales", "float16" if self._layout.half_scales else "float32", blocks))
        return planes + ([("offsets", "float32", blocks)] if self._form.offsets else [])

    def _computed(self, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        """Rows of all planes."""
        blocks = read_form(self._source, EMBEDDING, self._form, start=start, stop=stop)
        codes = (blocks.codes - np.uint8(self._lowest)).reshape(stop - start, -1)
        planes: dict[str, npt.NDArray[Any]] = {
            "codes": codes if self._layout.high_bits == 4 else packed(codes & np.uint8(15)),
            "scales": blocks.scales.astype(np.float16 if self._layout.half_scales else np.float32),
        }
        for bit in self._layout.bit_planes:
            planes[f"bit{bit}"] = np.packbits(codes >> bit & 1, axis=1, bitorder="little")
        if blocks.offsets is not None:
            planes["offsets"] = blocks.offsets
        return planes

    def _values(self, graph: GraphWriter, codes: str, parts: Mapping[str, str]) -> str:
        form, whole = self._form, graph.constant([0, 0, -1])
        values = graph.node("Cast", [codes], "embedding/code_values", to=TensorProto.FLOAT)
        zero = graph.constant(float((1 << (form.bits - 1)) - self._lowest), np.float32)
        values = graph.node("Sub", [values, zero], "embedding/centred")
        shape = graph.constant([0, 0, -1, form.block])
        values = graph.node("Reshape", [values, shape], "embedding/blocks")
        scales = parts["scales"]
        if self._layout.half_scales:
            scales = graph.node("Cast", [scales], "embedding/wide_scales", to=TensorProto.FLOAT)
        scales = graph.node("Unsqueeze", [scales, graph.constant([-1])], "embedding/scale_column")
        values = graph.node("Mul", [values, scales], "embedding/scaled_blocks")
        if form.offsets:
            offsets = graph.node("Unsqueeze", [parts["offsets"], graph.constant([-1])], "embedding/offset_column")
            values = graph.node("Add", [values, offsets], "embedding/shifted_blocks")
        values = graph.node("Reshape", [values, whole], "embedding/whole_rows")
        if self._width % form.block == 0:
            return values
        return graph.node("Slice", [values, *(graph.constant([n]) for n in (0, self._width, -1))], "embedding/rows")


def _whole_codes(graph: GraphWriter, parts: Mapping[str, str], layout: _Layout) -> str:
    """Codes of gathered rows, one a byte, out of their planes."""
    codes = parts["codes"]
    whole = graph.constant([0, 0, -1])
    if layout.high_bits < 4:
        low = graph.node("BitwiseAnd", [codes, graph.constant(15, np.uint8)], "embedding/low")
        high = graph.node("BitShift", [codes, graph.constant(4, np.uint8)], "embedding/high", direction="RIGHT")
        pair = [graph.node("Unsqueeze", [p, graph.constant([-1])], f"{p}/column") for p in (low, high)]
        pairs = graph.node("Concat", pair, "embedding/pairs", axis=-1)
        codes = graph.node("Reshape", [pairs, whole], "embedding/nibbles")
    for bit in layout.bit_planes:
        plane, shifts = parts[f"bit{bit}"], graph.constant(np.arange(8), np.uint8)
        column = graph.node("Unsqueeze", [plane, graph.constant([-1])], f"{plane}/column")
        bits = graph.node("BitShift", [column, shifts], f"{plane}/shifted", direction="RIGHT")
        bits = graph.node("BitwiseAnd", [bits, graph.constant(1, np.uint8)], f"{plane}/bits")
        bits = graph.node("Reshape", [bits, whole], f"{plane}/flat")
        bits = graph.node("BitShift", [bits, graph.constant(bit, np.uint8)], f"{plane}/placed", direction="LEFT")
        codes = graph.node("BitwiseOr", [codes, bits], f"{plane}/joined")
    return codes
