"""A decoder's weights in the data file beside its graph: each in its own form, written a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, numpy_helper

from edgecompose.formats.architectures import MODULES
from edgecompose_export.decoder_config import DecoderConfig
from edgecompose_export.graph_writer import MICROSOFT, DataFile, GraphWriter
from edgecompose_export.weight_blocks import (
    GGUF_FORMS,
    BlockForm,
    Blocks,
    packed,
    quantize_4bit,
    quantize_8bit,
    stored_rows,
)
from edgecompose_export.weight_source import EMBEDDING, HEAD, WeightSource

FloatForm = Literal["float32", "float16", "bfloat16"]
#: 'shared' is for an embedding that is not tied, but as good as equal to the output layer: it reads the same bytes.
Form = BlockForm | FloatForm | Literal["shared"]
#: Form of each float type of a file that keeps it as it is.
FLOAT_FORMS: Mapping[str, FloatForm] = {"F32": "float32", "F64": "float32", "F16": "float16", "BF16": "bfloat16"}
_NUMPY: Mapping[str, npt.DTypeLike] = {"float32": np.float32, "float16": np.float16}
#: Values of a matrix that are converted at once.
_CHUNK = 1 << 22
EIGHT, FOUR = BlockForm(8, 32), BlockForm(4, 32, True)
#: Called for a tensor's weights in a form that neither the file nor simple rounding gives.
Quantised = Callable[[], Blocks]


def source_form(kind: str) -> Form:
    """The form that keeps a tensor of a file as it is."""
    return FLOAT_FORMS[kind] if kind in FLOAT_FORMS else GGUF_FORMS[kind]


@dataclass(frozen=True, slots=True)
class _RowsForm:
    """How the embedding is kept when it shares no bytes with the output layer: 4 low bits, and `more` bits behind."""

    more: int
    half_scales: bool


#: Block types whose codes, less their smallest value, have few bits, or whose scales are float16.
_ROWS_FORMS: Mapping[str, _RowsForm] = {
    "Q4_0": _RowsForm(0, True), "Q4_1": _RowsForm(0, False), "Q4_K": _RowsForm(0, False), "Q2_K": _RowsForm(0, False),
    "Q3_K": _RowsForm(0, False), "Q5_0": _RowsForm(1, True), "Q5_1": _RowsForm(1, False), "Q5_K": _RowsForm(1, False),
    "Q6_K": _RowsForm(2, False), "Q8_0": _RowsForm(4, True), "IQ4_NL": _RowsForm(4, True),
    "IQ4_XS": _RowsForm(4, False),
}  # fmt: skip
#: Smallest code of those types whose codes do not begin at 0.
_LOWEST: Mapping[str, int] = {"Q5_0": 112, "Q5_1": 112, "Q5_K": 112, "Q6_K": 96}


class StoredWeights:
    """Weights in a data file.

    Describing them (by writing a graph) reserves their places; `fill` reads and writes them.

    Args:
        forms: of the weight of each linear module and of the output layer, by tensor; of the embedding, where it is not
            tied. A block form other than the file's own is quantised anew from the file's values.
        importance: for each linear module's tensor the mean square of its input, (n_in,), for 4 bits.
        quantised: tensors whose blocks are made already.
    """

    def __init__(
        self, source: WeightSource, forms: Mapping[str, Form], data: DataFile,
        importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
        quantised: Mapping[str, Quantised] | None = None,
    ) -> None:  # fmt: skip
        self._source, self._forms, self._data = source, forms, data
        self._importance, self._quantised = importance or {}, quantised or {}
        self._config: DecoderConfig = source.config
        self._jobs: list[tuple[int, Callable[[], Iterator[int]]]] = []

    @property
    def values(self) -> int:
        """Number of weights that `fill` writes."""
        return sum(count for count, _ in self._jobs)

    def fill(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Write what was reserved.

        Args:
            advance: called with the number of weights that were written, as they are.
        """
        for _, job in self._jobs:
            for count in job():
                advance(count)

    def groups(self, layer: int, modules: Sequence[str]) -> list[tuple[str, ...]]:
        """Neighbours of one form are one product: one reading of the input, one division of the work."""
        groups: list[tuple[str, ...]] = []
        for module in modules:
            form = self._forms[f"{layer}.{module}.weight"]
            if groups and self._forms[f"{layer}.{groups[-1][0]}.weight"] == form:
                groups[-1] += (module,)
            else:
                groups.append((module,))
        return groups

    def parameter(self, graph: GraphWriter, tensor: str) -> str:
        """As `Weights` has it."""
        return graph.tensor(numpy_helper.from_array(self._source.floats(tensor), tensor))

    def product(self, graph: GraphWriter, layer: int, modules: Sequence[str], source: str, target: str) -> str:
        """As `Weights` has it."""
        tensors = [f"{layer}.{module}.weight" for module in modules]
        return self._linear(graph, tensors, f"{layer}.{'+'.join(modules)}", source, target, self.bias(layer, modules))

    def head(self, graph: GraphWriter, hidden: str) -> str:
        """As `Weights` has it."""
        return self._linear(graph, [self._head_tensor], "head", hidden, "head/product", None)

    def embed(self, graph: GraphWriter, ids: str) -> str:
        """As `Weights` has it."""
        form = self._forms[HEAD if self._config.tied else EMBEDDING]
        shared = self._config.tied
        if form == "shared":
            form, shared = self._forms[HEAD], True
        assert form != "shared", "an output layer has bytes of its own"
        if isinstance(form, str):
            return self._embed_float(graph, ids, form)
        if shared and not form.offsets:
            return self._embed_shared(graph, ids, form)
        return self._embed_rows(graph, ids, form)

    @property
    def _head_tensor(self) -> str:
        return EMBEDDING if self._config.tied else HEAD

    def matrix(self, graph: GraphWriter, layer: int, modules: Sequence[str]) -> str:
        """The float weight (n_out, n_in) of a group of modules, as `product` stored it."""
        tensors = [f"{layer}.{module}.weight" for module in modules]
        form = self._forms[tensors[0]]
        assert not isinstance(form, BlockForm) and form != "shared", "only float weights are matrices"
        shape = (sum(self._source.shape(t)[0] for t in tensors), self._source.shape(tensors[0])[1])
        return self._float_matrix(graph, tensors, f"{layer}.{'+'.join(modules)}", form, shape)

    def bias(self, layer: int, modules: Sequence[str]) -> npt.NDArray[np.float32] | None:
        """The biases of a group of modules, None where none has one."""
        if not self._config.biases.intersection(modules):
            return None
        parts = []
        for module in modules:
            name = f"{layer}.{module}.bias"
            width = self._config.widths[module][0]
            parts.append(self._source.floats(name) if name in self._source else np.zeros(width, np.float32))
        return np.concatenate(parts)

    def _linear(
        self, graph: GraphWriter, tensors: list[str], name: str, source: str, target: str,
        bias: npt.NDArray[np.float32] | None,
    ) -> str:  # fmt: skip
        key = HEAD if tensors == [self._head_tensor] and name == "head" else tensors[0]
        form = self._forms[key]
        assert form != "shared", "only an embedding is shared"
        rows, width = sum(self._source.shape(t)[0] for t in tensors), self._source.shape(tensors[0])[1]
        if isinstance(form, str):
            weight = self._float_matrix(graph, tensors, name, form, (rows, width))
            plain = target if bias is None else f"{target}/unbiased"
            graph.node("FusedMatMul", [source, weight], plain, domain=MICROSOFT, transB=1)
            if bias is None:
                return target
            return graph.node("Add", [plain, self._vector(graph, bias, f"{name}.bias")], target)
        self._reserve_blocks(tensors, name, form, (rows, width))
        inputs = [
            _extended(graph, source, form, width),
            *(self._use(graph, f"{name}.{p}") for p in ("codes", "scales")),
        ]
        if form.zeros:
            inputs.append(self._use(graph, f"{name}.zeros"))
        if bias is not None:
            inputs += [""] * (5 - len(inputs)) + [self._vector(graph, bias, f"{name}.bias")]
        return graph.node(
            "MatMulNBits", inputs, target, domain=MICROSOFT, K=form.extended(width), N=rows, bits=form.bits,
            block_size=form.block, accuracy_level=4,
        )  # fmt: skip

    def _use(self, graph: GraphWriter, name: str) -> str:
        return graph.tensor(self._data.tensors[name])

    def _vector(self, graph: GraphWriter, values: npt.NDArray[np.float32], name: str) -> str:
        return graph.tensor(numpy_helper.from_array(values, name))

    def _reserve_blocks(self, tensors: list[str], name: str, form: BlockForm, shape: tuple[int, int]) -> None:
        if f"{name}.codes" in self._data.tensors:
            return
        rows, width = shape
        blocks = form.blocks(width)
        self._data.reserve(f"{name}.codes", "uint8", (rows, blocks, form.block * form.bits // 8))
        self._data.reserve(f"{name}.scales", "float32", (rows * blocks,))
        if form.zeros:
            self._data.reserve(f"{name}.zeros", "uint8", (rows * -(-blocks * form.bits // 8),))
        self._jobs.append((rows * width, lambda: self._write_blocks(tensors, name, form, width)))

    def _write_blocks(self, tensors: list[str], name: str, form: BlockForm, width: int) -> Iterator[int]:
        ends: dict[str, int] = {}
        for tensor in tensors:
            made = self._quantised[tensor]() if form.zeros else None
            for start, stop in _chunks(self._source.shape(tensor)):
                if made is not None:
                    rows = made[start:stop]
                else:
                    rows = read_form(self._source, tensor, form, start, stop, self._importance.get(tensor))
                for part, values in zip(("codes", "scales", "zeros"), stored_rows(rows, width), strict=True):
                    if values is not None:
                        ends[part] = self._data.write(f"{name}.{part}", values, ends.get(part, 0))
                yield (stop - start) * width

    def _float_matrix(
        self, graph: GraphWriter, tensors: list[str], name: str, form: FloatForm, shape: tuple[int, int]
    ) -> str:
        """A matrix (n_out, n_in); one that is kept in 16 bits is widened when the graph is loaded."""
        stored = f"{name}.weight" if form == "float32" else f"{name}.weight.{form}"
        if stored not in self._data.tensors:
            self._data.reserve(stored, form, shape)
            self._jobs.append((shape[0] * shape[1], lambda: self._write_floats(tensors, stored, form)))
        self._use(graph, stored)
        if form == "float32":
            return stored
        return graph.node("Cast", [stored], f"{name}.weight", to=TensorProto.FLOAT)

    def _write_floats(self, tensors: list[str], stored: str, form: FloatForm) -> Iterator[int]:
        end = 0
        for tensor in tensors:
            for start, stop in _chunks(self._source.shape(tensor)):
                values: npt.NDArray[Any] = self._source.floats(tensor, start, stop)
                if form == "bfloat16":
                    values = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
                end = self._data.write(stored, values.astype(_NUMPY.get(form, values.dtype)), end)
                yield (stop - start) * self._source.shape(tensor)[1]

    def _embed_float(self, graph: GraphWriter, ids: str, form: FloatForm) -> str:
        name = "head" if self._config.tied else "embedding"
        shape = self._source.shape(EMBEDDING)
        stored = f"{name}.weight" if form == "float32" else f"{name}.weight.{form}"
        if stored not in self._data.tensors:
            self._data.reserve(stored, form, shape)
            self._jobs.append((shape[0] * shape[1], lambda: self._write_floats([EMBEDDING], stored, form)))
        rows = graph.node("Gather", [self._use(graph, stored), ids], "embedding/rows", axis=0)
        return rows if form == "float32" else graph.node("Cast", [rows], "embedding/floats", to=TensorProto.FLOAT)

    def _embed_shared(self, graph: GraphWriter, ids: str, form: BlockForm) -> str:
        """An embedding that reads the bytes of the output layer."""
        rows, width = self._source.shape(EMBEDDING)
        blocks = form.blocks(width)
        self._reserve_blocks([self._head_tensor], "head", form, (rows, width))
        self._data.alias("embedding.codes", "head.codes", (rows, blocks * form.block * form.bits // 8))
        self._data.alias("embedding.scales", "head.scales", (rows, blocks))
        return graph.node(
            "GatherBlockQuantized", [self._use(graph, "embedding.codes"), ids, self._use(graph, "embedding.scales")],
            "embedding/rows", domain=MICROSOFT, gather_axis=0, quantize_axis=1, block_size=form.block, bits=form.bits,
        )  # fmt: skip

    def _embed_rows(self, graph: GraphWriter, ids: str, form: BlockForm) -> str:
        """An embedding of its own: planes of bits, scales and offsets, of which rows are gathered and computed."""
        kind = self._source.type_of(EMBEDDING)
        native = GGUF_FORMS.get(kind) == form
        rows_form = _ROWS_FORMS[kind] if native else _RowsForm(4 if form.bits == 8 else 0, False)
        lowest = _LOWEST.get(kind, 0) if native else 0
        rows, width = self._source.shape(EMBEDDING)
        blocks = -(-width // form.block)
        whole = blocks * form.block
        planes = [("codes", "uint8", whole if rows_form.more == 4 else whole // 2)]
        planes += [(f"bit{4 + i}", "uint8", whole // 8) for i in range(rows_form.more if rows_form.more < 4 else 0)]
        planes.append(("scales", "float16" if rows_form.half_scales else "float32", blocks))
        planes += [("offsets", "float32", blocks)] if form.offsets else []
        if "embedding.codes" not in self._data.tensors:
            for part, dtype, size in planes:
                self._data.reserve(f"embedding.{part}", dtype, (rows, size))
            parts = [part for part, _, _ in planes]
            self._jobs.append((rows * width, lambda: self._write_rows(form, rows_form, lowest, parts)))
        gathered = {
            part: graph.node("Gather", [self._use(graph, f"embedding.{part}"), ids], f"embedding/{part}", axis=0)
            for part, _, _ in planes
        }
        return _computed_rows(graph, gathered, form, rows_form, lowest, width)

    def _write_rows(self, form: BlockForm, rows_form: _RowsForm, lowest: int, parts: list[str]) -> Iterator[int]:
        ends = dict.fromkeys(parts, 0)
        shape = self._source.shape(EMBEDDING)
        for start, stop in _chunks(shape):
            blocks = read_form(self._source, EMBEDDING, form, start, stop)
            codes = (blocks.codes - np.uint8(lowest)).reshape(stop - start, -1)
            planes: dict[str, npt.NDArray[Any]] = {
                "codes": codes if rows_form.more == 4 else packed(codes & np.uint8(15)),
                "scales": blocks.scales.astype(np.float16 if rows_form.half_scales else np.float32),
            }
            for i in range(rows_form.more if rows_form.more < 4 else 0):
                planes[f"bit{4 + i}"] = np.packbits(codes >> (4 + i) & 1, axis=1, bitorder="little")
            if blocks.offsets is not None:
                planes["offsets"] = blocks.offsets
            for part in parts:
                ends[part] = self._data.write(f"embedding.{part}", planes[part], ends[part])
            yield (stop - start) * shape[1]


def read_form(
    source: WeightSource, tensor: str, form: BlockForm, start: int, stop: int,
    importance: npt.NDArray[np.float32] | None = None,
) -> Blocks:  # fmt: skip
    """Rows of a matrix in a block form: as the file has them where that is its form, else quantised from its values."""
    if GGUF_FORMS.get(source.type_of(tensor)) == form:
        return source.blocks(tensor, start, stop)
    rows = source.floats(tensor, start, stop)
    return quantize_4bit(rows, importance) if form == FOUR else quantize_8bit(rows, form.block)


def linear_tensors(config: DecoderConfig) -> list[str]:
    """The weights of all linear modules, in the order of computation."""
    return [f"{layer}.{module}.weight" for layer in range(len(config.layers)) for module in MODULES]


def _chunks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    rows, width = shape
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _extended(graph: GraphWriter, source: str, form: BlockForm, width: int) -> str:
    """What a product of blocks with offsets reads: its input and copies of the sums over its blocks; made once."""
    if not form.offsets:
        return source
    name = f"{source}/extended{form.block}"
    if any(name in node.output for node in graph.nodes[-64:]):
        return name
    cut = graph.constant([0, 0, -1, form.block])
    blocks = graph.node("Reshape", [source, cut], f"{source}/blocks{form.block}")
    sums = graph.node("ReduceSum", [blocks, graph.constant([-1])], f"{source}/blocksums{form.block}", keepdims=0)
    return graph.node("Concat", [source, *[sums] * form.copies(width)], name, axis=-1)


def _computed_rows(
    graph: GraphWriter, parts: Mapping[str, str], form: BlockForm, rows_form: _RowsForm, lowest: int, width: int
) -> str:
    """Values of gathered rows (batch, s, width) from their planes."""
    codes = parts["codes"]
    whole = graph.constant([0, 0, -1])
    if rows_form.more < 4:
        low = graph.node("BitwiseAnd", [codes, graph.constant(15, np.uint8)], "embedding/low")
        high = graph.node("BitShift", [codes, graph.constant(4, np.uint8)], "embedding/high", direction="RIGHT")
        pair = [graph.node("Unsqueeze", [p, graph.constant([-1])], f"{p}/column") for p in (low, high)]
        codes = graph.node(
            "Reshape", [graph.node("Concat", pair, "embedding/pairs", axis=-1), whole], "embedding/nibbles"
        )
    for i in range(rows_form.more if rows_form.more < 4 else 0):
        plane, shifts = parts[f"bit{4 + i}"], graph.constant(np.arange(8), np.uint8)
        column = graph.node("Unsqueeze", [plane, graph.constant([-1])], f"{plane}/column")
        bits = graph.node("BitShift", [column, shifts], f"{plane}/shifted", direction="RIGHT")
        bits = graph.node("BitwiseAnd", [bits, graph.constant(1, np.uint8)], f"{plane}/bits")
        bits = graph.node("Reshape", [bits, whole], f"{plane}/flat")
        bits = graph.node("BitShift", [bits, graph.constant(4 + i, np.uint8)], f"{plane}/placed", direction="LEFT")
        codes = graph.node("BitwiseOr", [codes, bits], f"{plane}/joined")
    values = graph.node("Cast", [codes], "embedding/code_values", to=TensorProto.FLOAT)
    zero = graph.constant(float((1 << (form.bits - 1)) - lowest), np.float32)
    values = graph.node("Sub", [values, zero], "embedding/centred")
    cut = graph.constant([0, 0, -1, form.block])
    values = graph.node("Reshape", [values, cut], "embedding/blocks")
    scales = parts["scales"]
    if rows_form.half_scales:
        scales = graph.node("Cast", [scales], "embedding/wide_scales", to=TensorProto.FLOAT)
    scales = graph.node("Unsqueeze", [scales, graph.constant([-1])], "embedding/scale_column")
    values = graph.node("Mul", [values, scales], "embedding/scaled_blocks")
    if form.offsets:
        offsets = graph.node("Unsqueeze", [parts["offsets"], graph.constant([-1])], "embedding/offset_column")
        values = graph.node("Add", [values, offsets], "embedding/shifted_blocks")
    values = graph.node("Reshape", [values, whole], "embedding/whole_rows")
    if width % form.block == 0:
        return values
    return graph.node("Slice", [values, *(graph.constant([n]) for n in (0, width, -1))], "embedding/rows")
