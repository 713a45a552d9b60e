"""A blend that is fused into a float base decodes as an attached one, and leaves no trace in the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("onnx", reason="a package of edgecompose-export")

import onnx
from onnx import numpy_helper

from edgecompose.bundle.files import sha256_of
from edgecompose.bundle.specs import BaseSpec, FusingSpec
from edgecompose.engine.decoding.decoder import Decoder, FusedDecoder
from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.engine.device import choose_device
from edgecompose.engine.fusing import Fuser, fused_bytes, require_fusing
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import GenerationError, ManifestInvalid
from edgecompose.formats.architectures import PACKED
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from edgecompose_export.graphs.fuse import DECODER_GRAPH, FUSE_GRAPH
from tests.engine.fused import BASES, TOLERANCE
from tests.export.decoders import IDS, NO_ADAPTER, difference, load_exported
from tests.fixtures_tiny import Exported, TinyZoo

pytestmark = pytest.mark.slow

Float = npt.NDArray[np.float32]
#: LoRA settings of a blend: mixed ranks, modules that are missing, a layer that is missing.
BLEND: tuple[dict[str, Any], ...] = (
    {"r": 4},
    {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"r": 3, "layers_to_transform": [1], "target_modules": ["k_proj", "up_proj"]},
)
PACKED_TARGETS = {part: whole for whole, parts in PACKED.items() for part in parts}


@dataclasses.dataclass(frozen=True)
class Opened:
    """The three sessions of an exported float base."""

    decoder: Decoder
    fusing: Fuser
    fused: FusedDecoder

    def attach(self, merged: MergedAdapter) -> DecoderState:
        return self.decoder.start(merged, len(IDS))

    def fuse(self, merged: MergedAdapter) -> DecoderState:
        return self.fused.start(self.fusing.fuse(merged), len(IDS))


@pytest.fixture(params=BASES, ids="-".join)
def base(request: pytest.FixtureRequest, zoo: TinyZoo) -> Exported:
    return zoo.base(*request.param)


@pytest.fixture
def llama(zoo: TinyZoo) -> Exported:
    return zoo.base("llama")


def open_base(base: Exported, spec: BaseSpec | None = None) -> Opened:
    spec, device = spec or base.spec, choose_device("cpu")
    fusing = require_fusing(spec)
    return Opened(
        Decoder(base.folder / spec.graph, spec, device),
        Fuser(base.folder / fusing.fuse_graph, spec, device),
        FusedDecoder(base.folder / fusing.decoder_graph, spec, device),
    )


def steps(decoding: DecoderState) -> Float:
    """Logits of all positions: a prefill, a chunk, then token by token."""
    rows = [decoding.forward(IDS[:25], rows=25).copy(), decoding.forward(IDS[25:32], rows=7).copy()]
    rows += [decoding.forward([token]).copy() for token in IDS[32:]]
    return np.concatenate(rows)


@pytest.fixture
def blend(zoo: TinyZoo, merger: Merger, tmp_path: Path) -> Callable[..., MergedAdapter]:
    """Makes blends of some of BLEND for a base."""

    def make(base: Exported, weights: tuple[float, ...]) -> MergedAdapter:
        architecture = base.folder.name.split("-")[0]
        adapters = []
        for i, settings in enumerate(BLEND[: len(weights)]):
            targets = settings.get("target_modules")
            if targets and architecture == "phi3":
                targets = sorted({PACKED_TARGETS.get(target, target) for target in targets})
            changed = settings if targets is None else {**settings, "target_modules": targets}
            lora = zoo.lora(f"fused{i}", architecture, **changed)
            file = tmp_path / f"{base.folder.name}-{i}.safetensors"
            file.unlink(missing_ok=True)
            adapters.append(load_exported(lora, base, file))
        return merger.merge(adapters, weights, MergeSettings())

    return make


@pytest.mark.parametrize("weights", [(0.8,), (0.7, -0.5, 1.2)], ids=["one", "three"])
def test_fuse_gives_the_logits_of_attach(
    base: Exported, blend: Callable[..., MergedAdapter], weights: tuple[float, ...]
) -> None:
    opened, merged = open_base(base), blend(base, weights)
    attached, fused = steps(opened.attach(merged)), steps(opened.fuse(merged))
    assert np.ptp(attached) > 1
    assert difference(attached, fused) <= TOLERANCE
    assert difference(fused, steps(opened.attach(NO_ADAPTER))) > 0.1


def test_a_fuse_leaves_no_trace(base: Exported, blend: Callable[..., MergedAdapter]) -> None:
    opened, merged = open_base(base), blend(base, (0.8,))
    before = [steps(opened.attach(adapter)) for adapter in (NO_ADAPTER, merged)]
    data = sha256_of(base.folder / "decoder.onnx.data")
    decoding = opened.fuse(merged)
    steps(decoding)
    during = [steps(opened.attach(adapter)) for adapter in (NO_ADAPTER, merged)]
    del decoding
    after = [steps(opened.attach(adapter)) for adapter in (NO_ADAPTER, merged)]
    for result in (during, after):
        assert all(np.array_equal(one, other) for one, other in zip(before, result, strict=True))
    assert sha256_of(base.folder / "decoder.onnx.data") == data


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_an_empty_blend_fuses_to_the_very_weights(zoo: TinyZoo, architecture: str) -> None:
    base = zoo.base(architecture)
    fused = open_base(base).fusing.fuse(NO_ADAPTER)
    stored = onnx.load(base.folder / base.spec.graph).graph
    matrices = [numpy_helper.to_array(t) for t in stored.initializer]
    sought = {matrix.T.shape + (matrix.T.tobytes(),) for matrix in matrices if matrix.ndim == 2}
    for offset, (panels, n_in, width) in fused.places.values():
        values = fused.buffer.numpy()[offset : offset + panels * n_in * width].reshape(panels, n_in, width)
        matrix = values.transpose(1, 0, 2).reshape(n_in, panels * width)
        assert matrix.shape + (matrix.tobytes(),) in sought


def test_only_float_bases_get_the_graphs_and_no_weight_is_stored_twice(zoo: TinyZoo, base: Exported) -> None:
    fusing = require_fusing(base.spec)
    assert (fusing.fuse_graph, fusing.decoder_graph) == (FUSE_GRAPH, DECODER_GRAPH)
    for name in (FUSE_GRAPH, DECODER_GRAPH):
        assert not (base.folder / f"{name}.data").exists()
        places = {
            entry.value
            for tensor in onnx.load(base.folder / name, load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places == {"decoder.onnx.data"}
    groups = ("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj")
    assert set(fusing.weights) == {f"layers.{layer}.{group}.weight" for layer in (0, 1) for group in groups}
    near = zoo.base("llama", "int8")
    assert near.spec.fusing is None
    assert not (near.folder / FUSE_GRAPH).exists()


def test_weights_that_do_not_divide_into_panels_are_one(zoo: TinyZoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgecompose_export.graphs import fuse
    from edgecompose_export.weights.source import open_weights

    config = dataclasses.replace(open_weights(zoo.model("llama")).config, hidden=50)
    assert fuse._panels(config, ("o_proj",)) == (1, 64, 50)
    monkeypatch.setattr(fuse, "PANEL", 10)
    assert fuse._panels(config, ("o_proj",)) == (5, 64, 10)


def test_fuses_in_turn_and_in_threads_give_what_each_gives_alone(
    llama: Exported, blend: Callable[..., MergedAdapter]
) -> None:
    opened = open_base(llama)
    blends = [blend(llama, weights) for weights in ((1.0,), (-1.0,), (0.7, -0.5, 1.2))]
    expected = [steps(opened.fuse(merged)) for merged in blends]
    assert difference(expected[0], expected[1]) > 0.1
    decodings = [opened.fuse(merged) for merged in blends]
    rows: list[list[Float]] = [[] for _ in blends]
    for token in IDS:
        for decoding, actual in zip(decodings, rows, strict=True):
            actual.append(decoding.forward([token]).copy())
    for actual, one in zip(rows, expected, strict=True):
        assert difference(np.concatenate(actual), one) <= TOLERANCE
    with ThreadPoolExecutor(4) as threads:
        results = threads.map(lambda merged: steps(opened.fuse(merged)), blends * 4)
        for result, one in zip(results, expected * 4, strict=True):
            assert np.array_equal(result, one)


def test_memory_is_used_again_only_when_nobody_reads_it(llama: Exported, blend: Callable[..., MergedAdapter]) -> None:
    opened, merged = open_base(llama), blend(llama, (0.8,))
    first = opened.fusing.fuse(merged)
    decoding, place = opened.fused.start(first, len(IDS)), first.buffer.data_ptr()
    del first
    second = opened.fusing.fuse(merged)
    assert second.buffer.data_ptr() != place
    assert (second.digest, second.bytes) == (merged.digest, fused_bytes(require_fusing(llama.spec)))
    del decoding
    assert opened.fusing.fuse(merged).buffer.data_ptr() == place


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (
            "int4",
            "fusing needs a float base; this bundle's base is int4; export the base with --precision fp32 or fp16",
        ),
        ("fp32", "this bundle's fp32 base was exported without them; export base and bundle again, or use attach"),
    ],
)
def test_a_base_that_cannot_be_fused_is_refused_by_name(llama: Exported, precision: str, message: str) -> None:
    spec = dataclasses.replace(llama.spec, precision=precision, fusing=None)
    with pytest.raises(GenerationError, match=message):
        require_fusing(spec)


@pytest.mark.parametrize("weights", [{}, {"w": (2, 3)}, {"w": (2, 3, 0)}, {"w": (1, 2, 3, 4)}], ids=str)
def test_weights_without_panels_are_refused(weights: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ManifestInvalid, match="fusing names no weight"):
        FusingSpec(FUSE_GRAPH, DECODER_GRAPH, weights)
