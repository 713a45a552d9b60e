"""Targets of a bundle's parts, read as the product reads them but without its base: hundreds of cases a second."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load, save

from edgecompose.bundle.adapter import load_adapter
from edgecompose.bundle.files import Bundle, describe_file, read_manifest
from edgecompose.bundle.manifest import MANIFEST_FILE, manifest_to_json
from edgecompose.bundle.specs import IndexSpec, TaskSpec
from edgecompose.engine.device import choose_device
from edgecompose.engine.graph_file import external_data, graph_path
from edgecompose.errors import EdgeComposeError
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import METHODS
from edgecompose.retrieval.examples import add_vectors
from edgecompose.retrieval.index import EXACT_BELOW, ExampleIndex, open_index, vectors_of
from edgecompose.retrieval.whitening import Whitening, load_whitening, save_whitening
from edgecompose.settings import MergeSettings
from tests.attack.mutations import INTEGERS, mutate_bytes, mutate_json, mutate_json_text, write_text
from tests.attack.target import Target
from tests.factories import BASE, GROUPS, make_adapter, write_adapter, write_bundle, write_index

ADAPTER, WHITENING, INDEX, GRAPH = "one.safetensors", "whitening.safetensors", "i.usearch", "base/model.onnx"
_WIDTH, _SMALL, _LARGE = 8, 300, EXACT_BELOW + 100
_FLOATS = (0.0, -1.0, 1e-45, 65504.0, 1e6, 1e30, 3.4e38, float("inf"), float("-inf"), float("nan"))


def mutate_tensors(rng: random.Random, path: Path) -> None:
    """Damage to a safetensors file: its bytes, its header, or the numbers of its tensors."""
    content, kind = path.read_bytes(), rng.randrange(4)
    end = 8 + int.from_bytes(content[:8], "little")
    if kind == 0:
        path.write_bytes(mutate_bytes(rng, content))
    elif kind == 1:
        header = json.dumps(mutate_json(rng, json.loads(content[8:end]))).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    else:
        tensors = {name: tensor.copy() for name, tensor in load(content).items()}
        for _ in range(rng.randint(1, 3)):
            _mutate_tensor(rng, tensors, rng.choice(sorted(tensors)))
        path.write_bytes(save(tensors, metadata=json.loads(content[8:end]).get("__metadata__")))


def _mutate_tensor(rng: random.Random, tensors: dict[str, np.ndarray[Any, Any]], name: str) -> None:
    tensor, kind = tensors[name], rng.randrange(8)
    values = _FLOATS if tensor.dtype.kind == "f" else (0, 1, 127, 128, 255, -1, -(2**31), 2**31 - 1)
    with np.errstate(all="ignore"):
        value = np.array(rng.choice(values)).astype(tensor.dtype)
        if kind <= 2 and tensor.size:
            tensor.flat[rng.randrange(tensor.size)] = value
        elif kind == 3:
            tensor[...] = value
        elif kind == 4 and tensor.dtype.kind == "f":
            tensor *= tensor.dtype.type(rng.choice((1e-3, -1, 100, 1e4)))
        elif kind == 5:
            tensors[name] = np.ascontiguousarray(tensor[: rng.randrange(len(tensor) + 1)] if tensor.ndim else tensor)
        elif kind == 6:
            tensors[name] = tensor.astype(rng.choice((np.float32, np.float16, np.int32, np.uint8)))
        else:
            tensors[name] = tensors[rng.choice(sorted(tensors))].copy()


def _prepare_manifest(folder: Path) -> None:
    write_bundle(folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.name != MANIFEST_FILE:
            path.rmdir() if path.is_dir() else path.unlink()


def _mutate_manifest(rng: random.Random, folder: Path) -> None:
    path = folder / MANIFEST_FILE
    write_text(path, mutate_json_text(rng, path.read_text(encoding="utf-8")))


def _attempt_manifest(folder: Path) -> str:
    manifest = read_manifest(folder)
    assert manifest.index.embedder == manifest.embedder.space
    manifest_to_json(manifest).encode()
    return "accepted"


def _prepare_adapter(folder: Path) -> None:
    write_adapter(folder / ADAPTER, make_adapter("one"))


@functools.cache
def _merger() -> Merger:
    return Merger(choose_device("cpu"))


def _attempt_adapter(folder: Path) -> str:
    """Read, and blended with another adapter by a method that its bytes choose; the blend must be finite."""
    path = folder / ADAPTER
    adapter = load_adapter(path, "one", GROUPS, BASE)
    choice = zlib.crc32(path.read_bytes())
    method = sorted(METHODS)[choice % len(METHODS)]
    settings = MergeSettings(method, norm_guard=choice % 7 == 0, rank=3 if method == "svd" and choice % 2 else None)
    merged = _merger().merge([adapter, make_adapter("two")], [0.7, -0.4], settings)
    for a, b in merged.factors().values():
        assert np.isfinite(a).all() and np.isfinite(b).all(), f"a blend by {method} is not finite"
    return "accepted"


def _prepare_whitening(folder: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((12, _WIDTH)).astype(np.float32)
    save_whitening(folder / WHITENING, Whitening(rng.standard_normal(12).astype(np.float32), matrix))


def _attempt_whitening(folder: Path) -> str:
    whitening = load_whitening(folder / WHITENING, 12, _WIDTH)
    turned = whitening(np.random.default_rng(1).standard_normal((5, 12)).astype(np.float32))
    norms = np.linalg.norm(turned.astype(np.float64), axis=1)
    assert np.isfinite(turned).all() and ((np.abs(norms - 1) < 1e-3) | (norms == 0)).all(), f"norms are {norms}"
    return "accepted"


def _vectors(count: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((count, _WIDTH)).astype(np.float32)


def _prepare_index(folder: Path, *, count: int) -> None:
    spec = write_index(folder / INDEX, _vectors(count, 0), dtype="f16")
    write_text(folder / "spec.json", json.dumps(dataclasses.asdict(spec)))


def _mutate_index(rng: random.Random, folder: Path) -> None:
    """Damage that is often where the numbers are that USearch follows."""
    path = folder / INDEX
    content = bytearray(path.read_bytes())
    rows, columns = struct.unpack_from("<II", content)
    head = 8 + rows * columns
    nodes = head + 64 + 40 + 2 * rows
    for _ in range(rng.randint(1, 3)):
        first, last = rng.choice(((0, 8), (head, head + 104), (head + 104, nodes), (nodes, len(content)), (8, head)))
        place = min(rng.randrange(first, last), max(0, len(content) - 8))
        form = rng.choice("BHIQ")
        bits = 8 * struct.calcsize(form)
        number = rng.choice(
            (0, 1, 2, rows, rows - 1, rows + 1, rng.randrange(2 * rows), (1 << bits) - 1, 1 << bits - 1)
        )
        struct.pack_into(f"<{form}", content, place, number % (1 << bits))
    path.write_bytes(mutate_bytes(rng, bytes(content)) if rng.random() < 0.2 else bytes(content))


def _attempt_index(folder: Path) -> str:
    """Searched, then read into memory, added to, fetched from, and written."""
    fields = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    spec = IndexSpec(**fields)
    index = ExampleIndex(folder / INDEX, spec, {"all": TaskSpec({"one": 1.0}, 0, spec.vectors)})
    for query in _vectors(3, 1):
        for neighbour in index.search(query, 50):
            assert -1 <= neighbour.similarity <= 1 and 0 <= neighbour.key < spec.vectors
    editable = open_index(folder / INDEX, spec, editable=True)
    add_vectors(editable, _vectors(5, 2), 1 << 40)
    assert vectors_of(editable, np.arange(1 << 40, (1 << 40) + 5, dtype=np.uint64)).shape == (5, _WIDTH)
    editable.search(_vectors(1, 3)[0], 50, threads=1)
    editable.save(str(folder / "out.usearch"))
    return "accepted"


def _prepare_graph(folder: Path) -> None:
    """A bundle whose decoder is a graph with external data in every place that may hold a tensor."""
    manifest = write_bundle(folder)
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4], [0.0] * 4)
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], value=tensor),
        onnx.helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner),
    ]
    function = onnx.helper.make_function("own", "F", [], ["c"], nodes[:1], [onnx.helper.make_opsetid("", 17)])
    graph = onnx.helper.make_graph(nodes, "g", [], [], [tensor])
    model = onnx.helper.make_model(graph, functions=[function])
    (folder / GRAPH).write_bytes(model.SerializeToString())
    _rehash(folder, manifest)


def _rehash(folder: Path, manifest: Any) -> None:
    files = manifest.files | {GRAPH: describe_file(folder / GRAPH)}
    write_text(folder / MANIFEST_FILE, manifest_to_json(dataclasses.replace(manifest, files=files)))


def _mutate_graph(rng: random.Random, folder: Path) -> None:
    path = folder / GRAPH
    if rng.random() < 0.5:
        model = onnx.load(path, load_external_data=False)
        for tensor in _tensors(model):
            if rng.random() < 0.4:
                entry = rng.choice(tensor.external_data)
                values = ("evil.data", "../x", "", "model.onnx.data", "17", "-1", str(rng.choice(INTEGERS)))
                entry.value = rng.choice(values)
        path.write_bytes(model.SerializeToString())
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    _rehash(folder, read_manifest(folder))


def _attempt_graph(folder: Path) -> str:
    """Every file that the onnx package sees is one that was seen here, and what is accepted names the manifest's."""
    content = (folder / GRAPH).read_bytes()
    try:
        seen = {data.location for data in external_data(content, GRAPH)}
    except EdgeComposeError:
        seen = None
    try:
        tensors = _tensors(onnx.load_from_string(content))
    except Exception:  # the package raises classes of protobuf
        tensors = []
    values = [e.value for t in tensors for e in t.external_data if e.key == "location"]
    named = {v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values}
    assert seen is None or named <= seen, f"{named - seen} were overlooked"
    graph_path(Bundle(folder), GRAPH)
    assert named <= {"model.onnx.data"}
    return "accepted"


def _tensors(message: Any) -> list[Any]:
    """All tensors of a message of onnx, however deep."""
    if isinstance(message, onnx.TensorProto):
        return [message]
    parts = [value for field, value in message.ListFields() if field.type == field.TYPE_MESSAGE]
    each = [one for part in parts for one in ([part] if hasattr(part, "ListFields") else part)]
    return [tensor for one in each for tensor in _tensors(one)]


def _mutate_file(name: str) -> Any:
    return lambda rng, folder: mutate_tensors(rng, folder / name)


TARGETS = (
    Target("manifest", "cheap", _prepare_manifest, _mutate_manifest, _attempt_manifest),
    Target("adapter", "cheap", _prepare_adapter, _mutate_file(ADAPTER), _attempt_adapter),
    Target("whitening", "cheap", _prepare_whitening, _mutate_file(WHITENING), _attempt_whitening),
    Target("graph-data", "cheap", _prepare_graph, _mutate_graph, _attempt_graph),
    Target("index", "cheap", functools.partial(_prepare_index, count=_SMALL), _mutate_index, _attempt_index),
    Target("large-index", "cheap", functools.partial(_prepare_index, count=_LARGE), _mutate_index, _attempt_index),
)
