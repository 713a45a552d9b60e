"""The weights of a decoder in the data file beside its graph: each in its own form, written in small chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, numpy_helper

from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.graphs.embedding_planes import EmbeddingPlanes
from edgecompose_export.graphs.writer import MICROSOFT, DataFile, GraphWriter
from edgecompose_export.weights.blocks import BlockForm, stored_rows
from edgecompose_export.weights.forms import FloatForm, Form, Quantised, read_form, row_chunks
from edgecompose_export.weights.places import EMBEDDING, HEAD
from edgecompose_export.weights.source import WeightSource

_NUMPY: Mapping[str, npt.DTypeLike] = {"float32": np.float32, "float16": np.float16}


class StoredWeights:
    """Weights in a data file.

    Writing a graph reserves the places of its weights; `fill` then reads and writes the weights.

    Args:
        forms: by tensor, for the weight of each linear module and of the output layer, and for an embedding that is not
            tied. Weights in another block form than the file's are quantised from the file's values.
        importance: for each linear module's tensor the mean square of its input, (n_in,), for 4 bits.
        quantised: tensors whose blocks exist already.
    """

    def __init__(
        self,
        source: WeightSource,
        forms: Mapping[str, Form],
        data: DataFile,
        *,
        importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
        quantised: Mapping[str, Quantised] | None = None,
    ) -> None:
        self._source, self._forms, self._data = source, forms, data
        self._importance, self._quantised = importance or {}, quantised or {}
        self._config: DecoderConfig = source.config
        self._jobs: list[tuple[int, Callable[[], Iterator[int]]]] = []

    @property
    def values(self) -> int:
        """Number of weights that `fill` writes."""
        return sum(count for count, _ in self._jobs)

    def fill(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Write all weights whose places are reserved.

        Args:
            advance: called with the number of weights of each chunk, after the chunk is written.
        """
        for _, job in self._jobs:
            for count in job():
                advance(count)

    def groups(self, layer: int, modules: Sequence[str]) -> list[tuple[str, ...]]:
        """As `BlockWeights`: neighbours of one form are one product, which reads its input once."""
        groups: list[tuple[str, ...]] = []
        for module in modules:
            form = self._forms[f"{layer}.{module}.weight"]
            if groups and self._forms[f"{layer}.{groups[-1][0]}.weight"] == form:
                groups[-1] += (module,)
            else:
                groups.append((module,))
        return groups

    def parameter(self, graph: GraphWriter, tensor: str) -> str:
        """As `Weights`."""
        return graph.tensor(numpy_helper.from_array(self._source.floats(tensor), tensor))

    def product(self, graph: GraphWriter, layer: int, modules: Sequence[str], *, source: str, target: str) -> str:
        """As `Weights`."""
        tensors = [f"{layer}.{module}.weight" for module in modules]
        name = f"{layer}.{'+'.join(modules)}"
        return self._linear(graph, tensors, name, source=source, target=target, bias=self.bias(layer, modules))

    def head(self, graph: GraphWriter, hidden: str) -> str:
        """As `Weights`."""
        return self._linear(graph, [self._head_tensor], "head", source=hidden, target="head/product", bias=None)

    def embed(self, graph: GraphWriter, ids: str) -> str:
        """As `Weights`."""
        form = self._forms[HEAD if self._config.tied else EMBEDDING]
        shared = self._config.tied
        if form == "shared":
            form, shared = self._forms[HEAD], True
        assert form != "shared", "an output layer has bytes of its own"
        if isinstance(form, str):
            return self._embed_float(graph, ids, form)
        if shared and not form.offsets:
            return self._embed_shared(graph, ids, form)
        return self._embed_planes(graph, ids, form)

    @property
    def _head_tensor(self) -> str:
        return EMBEDDING if self._config.tied else HEAD

    def matrix(self, graph: GraphWriter, layer: int, modules: Sequence[str]) -> str:
        """The float weight (n_out, n_in) of a group of modules, as `product` stored it."""
        tensors = [f"{layer}.{module}.weight" for module in modules]
        form = self._forms[tensors[0]]
        assert not isinstance(form, BlockForm) and form != "shared", "only float weights are matrices"
        shape = (sum(self._source.shape(t)[0] for t in tensors), self._source.shape(tensors[0])[1])
        return self._float_matrix(graph, tensors, f"{layer}.{'+'.join(modules)}", form=form, shape=shape)

    def bias(self, layer: int, modules: Sequence[str]) -> npt.NDArray[np.float32] | None:
        """The biases of a group of modules, None where no module has one."""
        if not self._config.biases.intersection(modules):
            return None
        parts = []
        for module in modules:
            name = f"{layer}.{module}.bias"
            width = self._config.widths[module][0]
            parts.append(self._source.floats(name) if name in self._source else np.zeros(width, np.float32))
        return np.concatenate(parts)

    def _linear(
        self,
        graph: GraphWriter,
        tensors: list[str],
        name: str,
        *,
        source: str,
        target: str,
        bias: npt.NDArray[np.float32] | None,
    ) -> str:
        key = HEAD if tensors == [self._head_tensor] and name == "head" else tensors[0]
        form = self._forms[key]
        assert form != "shared", "only an embedding is shared"
        rows, width = sum(self._source.shape(t)[0] for t in tensors), self._source.shape(tensors[0])[1]
        if isinstance(form, str):
            weight = self._float_matrix(graph, tensors, name, form=form, shape=(rows, width))
            plain = target if bias is None else f"{target}/unbiased"
            graph.node("FusedMatMul", [source, weight], plain, domain=MICROSOFT, transB=1)
            if bias is None:
                return target
            return graph.node("Add", [plain, self._vector(graph, bias, f"{name}.bias")], target)
        self._reserve_blocks(tensors, name, form=form, shape=(rows, width))
        inputs = [
            _extended(graph, source, form=form, width=width),
            *(self._use(graph, f"{name}.{p}") for p in ("codes", "scales")),
        ]
        if form.zeros:
            inputs.append(self._use(graph, f"{name}.zeros"))
        if bias is not None:
            inputs += [""] * (5 - len(inputs)) + [self._vector(graph, bias, f"{name}.bias")]
        return graph.node(
            "MatMulNBits",
            inputs,
            target,
            domain=MICROSOFT,
            K=form.extended(width),
            N=rows,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=4,
        )

    def _use(self, graph: GraphWriter, name: str) -> str:
        return graph.tensor(self._data.tensors[name])

    def _vector(self, graph: GraphWriter, values: npt.NDArray[np.float32], name: str) -> str:
        return graph.tensor(numpy_helper.from_array(values, name))

    def _reserve_blocks(self, tensors: list[str], name: str, *, form: BlockForm, shape: tuple[int, int]) -> None:
        if f"{name}.codes" in self._data.tensors:
            return
        rows, width = shape
        blocks = form.blocks(width)
        self._data.reserve(f"{name}.codes", "uint8", (rows, blocks, form.block * form.bits // 8))
        self._data.reserve(f"{name}.scales", "float32", (rows * blocks,))
        if form.zeros:
            self._data.reserve(f"{name}.zeros", "uint8", (rows * -(-blocks * form.bits // 8),))
        self._jobs.append((rows * width, lambda: self._write_blocks(tensors, name, form=form, width=width)))

    def _write_blocks(self, tensors: list[str], name: str, *, form: BlockForm, width: int) -> Iterator[int]:
        ends: dict[str, int] = {}
        for tensor in tensors:
            blocks = self._quantised[tensor]() if form.zeros else None
            for start, stop in row_chunks(self._source.shape(tensor)):
                if blocks is not None:
                    rows = blocks[start:stop]
                else:
                    importance = self._importance.get(tensor)
                    rows = read_form(self._source, tensor, form, start=start, stop=stop, importance=importance)
                for part, values in zip(("codes", "scales", "zeros"), stored_rows(rows, width), strict=True):
                    if values is not None:
                        ends[part] = self._data.write(f"{name}.{part}", values, ends.get(part, 0))
                yield (stop - start) * width

    def _float_matrix(
        self, graph: GraphWriter, tensors: list[str], name: str, *, form: FloatForm, shape: tuple[int, int]
    ) -> str:
        """A matrix (n_out, n_in); a matrix in 16 bits is widened when the graph is loaded."""
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
            for start, stop in row_chunks(self._source.shape(tensor)):
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
        self._reserve_blocks([self._head_tensor], "head", form=form, shape=(rows, width))
        self._data.alias("embedding.codes", "head.codes", (rows, blocks * form.block * form.bits // 8))
        self._data.alias("embedding.scales", "head.scales", (rows, blocks))
        return graph.node(
            "GatherBlockQuantized",
            [self._use(graph, "embedding.codes"), ids, self._use(graph, "embedding.scales")],
            "embedding/rows",
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=form.block,
            bits=form.bits,
        )

    def _embed_planes(self, graph: GraphWriter, ids: str, form: BlockForm) -> str:
        """An embedding with bytes of its own."""
        planes = EmbeddingPlanes(self._source, form)
        if "embedding.codes" not in self._data.tensors:
            planes.reserve(self._data)
            self._jobs.append((planes.values, lambda: planes.write(self._data)))
        return planes.lookup(graph, self._data, ids)


def _extended(graph: GraphWriter, source: str, *, form: BlockForm, width: int) -> str:
    """The input of a product of blocks with offsets: the source and copies of its block sums. Written once."""
    if not form.offsets:
        return source
    name = f"{source}/extended{form.block}"
    if any(name in node.output for node in graph.nodes[-64:]):
        return name
    shape = graph.constant([0, 0, -1, form.block])
    blocks = graph.node("Reshape", [source, shape], f"{source}/blocks{form.block}")
    sums = graph.node("ReduceSum", [blocks, graph.constant([-1])], f"{source}/blocksums{form.block}", keepdims=0)
    return graph.node("Concat", [source, *[sums] * form.copies(width)], name, axis=-1)
