"""What is done for CUDA, checked on a CPU: attention in float16, where caches and the embedder lie, and who picks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("onnx", reason="a package of edgecompose-export")

import onnx
from onnx import TensorProto, helper

from edgecompose import Composer, Request, open_bundle
from edgecompose.bundle.files import Bundle, sha256_of, verify
from edgecompose.bundle.specs import BaseSpec, EmbedderSpec, KVCacheType
from edgecompose.engine import device as devices
from edgecompose.engine.decoding.decoder import Decoder, FusedDecoder, decoder_graph
from edgecompose.engine.decoding.decoder_pass import PassBinding
from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.engine.decoding.kv_cache import KVCache, cache_dtype
from edgecompose.engine.device import Device, choose_device, host
from edgecompose.engine.fusing import Fuser, require_fusing
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import BundleError, ExportError, GenerationError
from edgecompose.merging.merger import Merger
from edgecompose.retrieval.embedder import embedder_device
from edgecompose.serialize import explain_answer
from edgecompose.settings import MergeSettings
from edgecompose.tasks import add_task, remove_task
from edgecompose_export.base import write as base_write
from edgecompose_export.base.export import export_base
from edgecompose_export.graphs.cuda import narrow_attention
from tests import tiny
from tests.engine.fused import change_base
from tests.export.decoders import IDS, NO_ADAPTER, difference, load_exported
from tests.fixtures_tiny import TASKS, Exported, TinyZoo

pytestmark = pytest.mark.slow

Float = npt.NDArray[np.float32]
CPU = choose_device("cpu")
#: What a GPU would be; nothing is run on it here.
CUDA = Device("cuda", ("CUDAExecutionProvider", "CPUExecutionProvider"), "for a test")
#: Largest difference of a logit, over the largest logit, that attention in float16 makes on the tiny models.
TOLERANCE = 2e-2
BASES = (*((name, "fp32") for name in tiny.ARCHITECTURES), ("llama", "fp16"))
PROMPT = TASKS["animals"][0]


@pytest.fixture(params=BASES, ids="-".join)
def base(request: pytest.FixtureRequest, zoo: TinyZoo) -> Exported:
    return zoo.base(*request.param)


def blend_for(base: Exported, zoo: TinyZoo, merger: Merger, folder: Path) -> MergedAdapter:
    """Two adapters of different ranks."""
    architecture = base.folder.name.split("-")[0]
    loras = [zoo.lora("half0", architecture), zoo.lora("half1", architecture, r=2, use_rslora=True)]
    adapters = [load_exported(lora, base, folder / f"{lora.name}.safetensors") for lora in loras]
    return merger.merge(adapters, [0.7, -0.5], MergeSettings())


def steps(decoding: DecoderState) -> list[Float]:
    """Logits of a prompt, a chunk, single tokens, and again after going back."""
    rows = [decoding.forward(IDS[:25], rows=25).copy(), decoding.forward(IDS[25:32], rows=7).copy()]
    rows += [decoding.forward([token]).copy() for token in IDS[32:]]
    decoding.rewind(30)
    return [*rows, decoding.forward(IDS[30:], rows=len(IDS) - 30).copy()]


def check_near(result: Sequence[Float], expected: Sequence[Float]) -> None:
    for ours, theirs in zip(result, expected, strict=True):
        assert difference(ours, theirs) <= TOLERANCE * np.abs(theirs).max()


# The graph


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "adapted"])
def test_attention_in_float16_stays_near_float32(
    base: Exported, zoo: TinyZoo, merger: Merger, tmp_path: Path, adapted: bool
) -> None:
    """ONNX Runtime has the float16 kernel on the CPU too."""
    merged = blend_for(base, zoo, merger, tmp_path) if adapted else NO_ADAPTER
    exact, half = (Decoder(base.folder / decoder_graph(base.spec, d), base.spec, CPU) for d in (CPU, CUDA))
    expected, result = (steps(decoder.start(merged, len(IDS))) for decoder in (exact, half))
    check_near(result, expected)
    assert any(difference(ours, theirs) > 0 for ours, theirs in zip(result, expected, strict=True))


def test_a_fused_base_with_attention_in_float16(base: Exported, zoo: TinyZoo, merger: Merger, tmp_path: Path) -> None:
    merged, spec = blend_for(base, zoo, merger, tmp_path), base.spec
    weights = Fuser(base.folder / require_fusing(spec).fuse_graph, spec, CPU).fuse(merged)
    exact, half = (FusedDecoder(base.folder / decoder_graph(spec, d, fused=True), spec, CPU) for d in (CPU, CUDA))
    check_near(*(steps(decoder.start(weights, len(IDS))) for decoder in (half, exact)))


def without_rounded_activations(graph: Path, folder: Path) -> Path:
    """A graph whose packed weights compute in float32, as on CUDA: int8 activations answer any change with a jump."""
    model = onnx.load(graph)
    for node in model.graph.node:
        remaining = [a for a in node.attribute if a.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(remaining)
    onnx.save(model, folder / graph.name)
    return folder / graph.name


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_greedy_tokens_are_the_same(zoo: TinyZoo, merger: Merger, tmp_path: Path, precision: str) -> None:
    base = zoo.base("llama", precision)
    merged = blend_for(base, zoo, merger, tmp_path)
    graphs = [without_rounded_activations(base.folder / decoder_graph(base.spec, d), tmp_path) for d in (CPU, CUDA)]
    exact, half = (Decoder(graph, base.spec, CPU).start(merged, 40) for graph in graphs)
    rows = [decoding.forward(IDS[:20])[0].copy() for decoding in (exact, half)]
    ids: list[int] = []
    while len(ids) < 20:
        ids.append(int(rows[0].argmax()))
        assert rows[1].max() - rows[1][ids[-1]] <= 0.01 * np.ptp(rows[1])  # the same token, or one as good
        rows = [decoding.forward(ids[-1:])[0].copy() for decoding in (exact, half)]


def test_only_attention_changes_and_no_weight_is_stored_twice(base: Exported) -> None:
    fusing = require_fusing(base.spec)
    pairs = ((base.spec.graph, base.spec.cuda_graph), (fusing.decoder_graph, fusing.cuda_decoder_graph))
    for name, cuda_name in pairs:
        assert cuda_name == name.replace(".onnx", "_cuda.onnx")
        exact, half = (onnx.load(base.folder / n, load_external_data=False).graph for n in (name, cuda_name))
        assert list(half.initializer) == list(exact.initializer)
        assert not (base.folder / f"{cuda_name}.data").exists()
        caches = {v.name for v in (*exact.input, *exact.output) if v.name.startswith(("past", "present"))}
        for old, new in zip((*exact.input, *exact.output), (*half.input, *half.output), strict=True):
            kind = new.type.tensor_type
            assert kind.elem_type == (TensorProto.FLOAT16 if new.name in caches else old.type.tensor_type.elem_type)
            assert kind.shape == old.type.tensor_type.shape
        added = [n for n in half.node if n.op_type == "Cast" and any("/half" in x for x in (*n.input, *n.output))]
        remaining = [n.op_type for n in half.node if n not in added]
        assert remaining == [n.op_type for n in exact.node]
        assert len(added) == base.spec.layers * 4  # queries, keys, values and what attention gives


def test_every_float_input_of_attention_is_narrowed_once() -> None:
    """Bias and sinks too, which our architectures do not have."""
    value = ["qkv", "", "", "pk", "pv", "seqlens_k", "total", "cos", "sin", "", "bias", "sink"]
    nodes = [
        helper.make_node("Neg", ["x"], ["qkv"], "first"),
        *(helper.make_node("GroupQueryAttention", value, [f"y{i}", f"k{i}", f"v{i}"], f"attn{i}") for i in range(2)),
        helper.make_node("Add", ["y0", "y1"], ["sum"], "last"),
    ]
    names, floats = ("x", "pk", "pv"), (TensorProto.FLOAT,)
    inputs = [helper.make_tensor_value_info(name, floats[0], None) for name in names]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("sum", floats[0], None)])
    narrow_attention(graph)
    made = [(n.op_type, *n.input, *n.output) for n in graph.node]
    assert sorted(n[1] for n in made if n[0] == "Cast") == sorted(
        ["qkv", "cos", "sin", "bias", "sink", "y0/half", "y1/half"]
    )
    assert made[4:8] == [("Neg", "x", "qkv"), ("Cast", "qkv", "qkv/half"), made[6], ("Cast", "y0/half", "y0")]
    assert [i.type.tensor_type.elem_type for i in graph.input] == [1, 10, 10]
    with pytest.raises(ExportError, match="no GroupQueryAttention"):
        narrow_attention(helper.make_graph([nodes[0]], "g", [], []))


def test_a_base_whose_keys_are_too_large_for_float16_gets_no_graph(
    zoo: TinyZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_write, "LARGEST_HALF", 0.0)
    spec = export_base(zoo.model("llama"), tmp_path / "base", "fp32")
    assert spec.cuda_graph is None
    assert require_fusing(spec).cuda_decoder_graph is None
    assert not list((tmp_path / "base").glob("*cuda*"))


# Which graph, and where things lie


def test_the_graph_is_picked_by_the_device(zoo: TinyZoo) -> None:
    spec = zoo.base("llama").spec
    assert [decoder_graph(spec, d) for d in (CPU, CUDA)] == ["decoder.onnx", "decoder_cuda.onnx"]
    fused = [decoder_graph(spec, d, fused=True) for d in (CPU, CUDA)]
    assert fused == ["decoder_fused.onnx", "decoder_fused_cuda.onnx"]
    fusing = dataclasses.replace(require_fusing(spec), cuda_decoder_graph=None)
    old = dataclasses.replace(spec, cuda_graph=None, fusing=fusing)
    assert (decoder_graph(old, CUDA), decoder_graph(old, CUDA, fused=True)) == ("decoder.onnx", "decoder_fused.onnx")
    with pytest.raises(GenerationError, match="fusing needs a float base"):
        decoder_graph(dataclasses.replace(spec, precision="int4", fusing=None), CUDA, fused=True)


class Placed:
    """A device that notes what is put on it, in ordinary memory."""

    kind = "cuda"

    def __init__(self) -> None:
        self.made: list[tuple[tuple[int, ...], Any]] = []

    def empty(self, shape: Sequence[int], dtype: Any = np.float32) -> Any:
        self.made.append((tuple(shape), dtype))
        return CPU.empty(shape, dtype)


@pytest.mark.parametrize("graph", ["decoder.onnx", "decoder_cuda.onnx"])
def test_a_float32_cache_stays_on_the_host(zoo: TinyZoo, graph: str) -> None:
    base, device = zoo.base("llama"), Placed()
    session = Decoder(base.folder / graph, base.spec, CPU)._session
    cache = KVCache(session, base.spec, device)  # type: ignore[arg-type]
    cache.grow(9, lengths=[0])
    halves = [((1, base.spec.kv_heads, cache.capacity, base.spec.head_size), np.float16)] * 4
    assert device.made == ([] if graph == "decoder.onnx" else halves)


@pytest.mark.parametrize("types", [["bfloat16"], ["float", "float16"], []], ids=str)
def test_caches_of_another_type_are_refused(types: list[str]) -> None:
    inputs = [SimpleNamespace(name=f"past_key_values.{i}.key", type=f"tensor({t})") for i, t in enumerate(types)]
    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="input_ids", type="tensor(int64)"), *inputs])
    with pytest.raises(BundleError, match="caches are of type .*export the bundle again"):
        cache_dtype(session)


def test_what_a_step_changes_is_bound_at_each_step(zoo: TinyZoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on another device than its reader is copied when it is bound, and only then."""
    base, bound = zoo.base("llama"), list[str]()
    decoding = Decoder(base.folder / base.spec.graph, base.spec, CPU).start(NO_ADAPTER, 8)
    feed = PassBinding._feed

    def watched(self: PassBinding, name: str, value: Any) -> None:
        bound.append(name)
        feed(self, name, value)

    monkeypatch.setattr(PassBinding, "_feed", watched)
    for ids in ([5, 6], [7], [8]):
        bound.clear()
        decoding.forward(ids)
        assert {"input_ids", "seqlens_k", "query_seqlens", "total_sequence_length", "logits_at"} <= set(bound)


def test_cuda_is_opened_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    class Session:
        def __init__(self, source: Any, options: Any, providers: Any) -> None:
            opened.append(providers)

        def get_providers(self) -> list[str]:
            return [name for name, _ in opened[-1]]

        get_inputs = get_outputs = get_overridable_initializers = lambda self: ()

    monkeypatch.setattr("edgecompose.engine.device.onnxruntime.InferenceSession", Session)
    monkeypatch.setattr(devices, "has_cuda_provider", lambda: True)
    devices.open_session(b"", choose_device("cuda"), name="any")
    assert opened == [[("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]] * 2


def test_an_int8_embedder_runs_on_the_cpu() -> None:
    spec = EmbedderSpec(
        graph="e.onnx",
        tokenizer="t.json",
        identity="0" * 64,
        precision="int8",
        dimension=8,
        max_length=16,
        pooling="mean",
        normalize=True,
    )
    place = embedder_device(spec, CUDA)
    assert (place.kind, place.reason) == ("cpu", "cuda has no kernels for an int8 embedder")
    assert embedder_device(spec, CPU) is CPU
    assert embedder_device(dataclasses.replace(spec, precision="f32"), CUDA) is CUDA


# In a bundle


def test_an_explanation_says_where_the_embedder_ran(bundle: Path) -> None:
    with open_bundle(bundle, device="cpu") as composer:
        answer = composer.run(PROMPT, Request(max_tokens=1))
        assert answer.embedder_device == composer.device
        assert composer.run(PROMPT, Request(weights={}, max_tokens=1)).embedder_device is None
    assert not any(line.startswith("embedder") for line in explain_answer(answer))
    apart = dataclasses.replace(answer, device=CUDA, embedder_device=host("a reason"))
    assert "embedder      cpu (a reason)" in explain_answer(apart)


def test_a_bundle_keeps_the_graphs_as_tasks_come_and_go(
    zoo: TinyZoo, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    names = {"base/decoder_cuda.onnx", "base/decoder_fused_cuda.onnx"}
    add_task(bundle_copy, "travel", zoo.lora("travel", r=2), tiny.write_task(tmp_path / "t.jsonl", ("to the sea",)))
    remove_task(bundle_copy, "animals")
    assert verify(bundle_copy) == []
    manifest = Bundle(bundle_copy).manifest
    assert names <= set(manifest.named_files()) & set(manifest.files)
    for name in names:
        assert manifest.files[name].sha256 == sha256_of(bundle_copy / name)


@pytest.mark.parametrize("attachment", ["attach", "fuse"])
def test_the_composer_takes_the_graph_of_its_device(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, attachment: Any
) -> None:
    """Graphs of CUDA run on the CPU here; the files of the others are not even looked at."""
    request = Request(weights={"animals": 1.0}, choices=("yes", "no"), attachment=attachment)
    with open_bundle(bundle_copy, device="cpu") as composer:
        expected = composer.run(PROMPT, request).choices
    picked = list[str]()

    def pick(spec: BaseSpec, device: Device, *, fused: bool = False, kv_cache: KVCacheType = "float32") -> str:
        picked.append(decoder_graph(spec, CUDA, fused=fused, kv_cache=kv_cache))
        return picked[-1]

    monkeypatch.setattr("edgecompose.generation.language_model.decoder_graph", pick)
    with open_bundle(bundle_copy, device="cpu") as composer:
        result = composer.run(PROMPT, request).choices
    assert result is not None
    assert result == pytest.approx(expected, abs=1e-2)
    fused = ["base/decoder_fused_cuda.onnx"] if attachment == "fuse" else []
    assert picked == ["base/decoder_cuda.onnx", *fused]  # the first when the bundle is opened


def test_a_bundle_from_before_opens_and_runs_the_float32_graph(bundle_copy: Path) -> None:
    def forget(base: dict[str, Any]) -> None:
        del base["cuda_graph"], base["fusing"]["cuda_decoder_graph"]

    change_base(bundle_copy, forget)
    with open_bundle(bundle_copy, device="cpu") as composer:
        assert composer.run(PROMPT).text
    spec = Composer(composer.bundle, CUDA).bundle.manifest.base
    assert decoder_graph(spec, CUDA) == "base/decoder.onnx"
