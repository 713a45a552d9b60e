"""Quantised keys and values: what a token gets does not depend on how, or beside whom, it is run."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("onnx", reason="a package of edgecompose-export")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgecompose.bundle.specs import KVCacheType
from edgecompose.engine.decoding.decoder import Decoder, decoder_graph
from edgecompose.engine.device import Device, choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import GenerationError
from edgecompose.generation.scoring import log_softmax
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from edgecompose_export.graphs.kv_cache import write_kv_graph
from tests.export.decoders import IDS, NO_ADAPTER, load_exported
from tests.fixtures_tiny import Exported, TinyZoo

pytestmark = pytest.mark.slow

Float = npt.NDArray[np.float32]
CPU = choose_device("cpu")
LONG = np.random.default_rng(7).integers(0, 290, 400).tolist()


def open_quantised(base: Exported, kv_cache: KVCacheType = "int8") -> Decoder:
    return Decoder(base.folder / decoder_graph(base.spec, CPU, kv_cache=kv_cache), base.spec, CPU)


@pytest.fixture(scope="module")
def base(zoo: TinyZoo) -> Exported:
    """Weights are quantised: products then do not depend on the number of rows."""
    return zoo.base("llama", "int8")


@pytest.fixture(scope="module")
def decoder(base: Exported) -> Decoder:
    return open_quantised(base)


@pytest.fixture
def blends(zoo: TinyZoo, base: Exported, merger: Merger, tmp_path: Path) -> list[MergedAdapter]:
    """The base alone, and two blends of other ranks."""
    loras = [zoo.lora("kv0"), zoo.lora("kv1", r=2, use_rslora=True)]
    adapters = [load_exported(lora, base, tmp_path / f"{lora.name}.safetensors") for lora in loras]
    return [
        NO_ADAPTER,
        merger.merge(adapters, [0.7, -0.5], MergeSettings()),
        merger.merge(adapters[1:], [1.0], MergeSettings()),
    ]


def written(decoder: Decoder, blend: MergedAdapter, prompt: list[int], answer: list[int]) -> Float:
    """The logits after each token of an answer that is written a token a pass."""
    state = decoder.start(blend, len(prompt) + len(answer))
    state.forward(prompt)
    logits = [state.step([token])[0].copy() for token in answer]
    state.leave(keep=0)
    return np.array(logits)


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8), length=st.integers(1, 60))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_several_tokens_a_pass_get_what_each_gets_in_a_pass_of_its_own(
    decoder: Decoder, blends: list[MergedAdapter], cuts: list[int], length: int
) -> None:
    prompt, answer = LONG[:length], LONG[100 : 100 + sum(cuts)]
    expected = written(decoder, blends[1], prompt, answer)
    state = decoder.start(blends[1], length + len(answer))
    state.forward(prompt)
    start = 0
    for count in cuts:
        np.testing.assert_array_equal(state.step(answer[start : start + count]), expected[start : start + count])
        start += count
    state.leave(keep=0)


def test_sequences_of_one_pass_under_other_blends_get_what_each_gets_alone(
    decoder: Decoder, blends: list[MergedAdapter]
) -> None:
    prompts = [LONG[:n] for n in (5, 130, 40, 64, 1)]
    turns = [blends[i % 3] for i in range(5)]
    answer = LONG[200:230]
    expected = [written(decoder, blend, prompt, answer) for blend, prompt in zip(turns, prompts, strict=True)]
    results: list[Float | None] = [None] * 5

    def work(place: int) -> None:
        results[place] = written(decoder, turns[place], prompts[place], answer)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, logits in zip(results, expected, strict=True):
        assert result is not None
        np.testing.assert_array_equal(result, logits)


def test_a_cache_that_grows_and_one_that_is_rewound_hold_what_a_fresh_one_holds(decoder: Decoder) -> None:
    wide, narrow = (decoder.start(MergedAdapter({}, "grows"), 400, reserve=reserve) for reserve in (400, 3))
    assert narrow.hold().cache.capacity < wide.hold().cache.capacity
    for ids in (LONG[:150], LONG[150:290]):
        np.testing.assert_array_equal(wide.forward(ids), narrow.forward(ids))
    wide.rewind(140)
    wide.forward(LONG[:30])
    wide.rewind(128)
    narrow.rewind(128)
    np.testing.assert_array_equal(wide.step(LONG[300:304]), narrow.step(LONG[300:304]))


def test_the_cache_takes_a_quarter_of_the_memory(base: Exported, decoder: Decoder) -> None:
    exact = Decoder(base.folder / base.spec.graph, base.spec, CPU)
    sizes = [d.start(MergedAdapter({}, "fresh"), 256).hold().cache.bytes for d in (exact, decoder)]
    assert sizes[0] == 4 * sizes[1] > 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma2", "mistral", "granite"])
def test_next_tokens_stay_as_likely_as_with_float_caches(zoo: TinyZoo, name: str) -> None:
    base = zoo.base(name, "fp32")
    logs = []
    for decoder in (Decoder(base.folder / base.spec.graph, base.spec, CPU), open_quantised(base)):
        state = decoder.start(NO_ADAPTER, len(IDS))
        logs.append(log_softmax(np.concatenate([state.forward(IDS[:30], rows=30).copy(), state.step(IDS[30:])])))
    assert 0 < (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean() < 0.01


def test_codes_of_four_bits_share_bytes(zoo: TinyZoo, base: Exported, tmp_path: Path) -> None:

    import onnx

    from edgecompose.bundle.specs import KVGraph

    folder = shutil.copytree(base.folder, tmp_path / "four")
    model = onnx.load(folder / base.spec.kv_graphs["int8"].graph, load_external_data=False)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("/scale")}
    scales = {name.removesuffix("/scale"): values * np.float32(127 / 7) for name, values in tensors.items()}
    name = write_kv_graph(folder / base.spec.graph, 4, scales)
    spec = dataclasses.replace(base.spec, kv_graphs={"int4": KVGraph(name, 0.01)})
    four = open_quantised(Exported(folder, spec), "int4")
    state, exact = four.start(NO_ADAPTER, 100), Decoder(base.folder / base.spec.graph, base.spec, CPU)
    assert state.hold().cache.bytes * 8 == exact.start(NO_ADAPTER, 100).hold().cache.bytes
    expected = written(four, NO_ADAPTER, IDS[:20], IDS[20:])
    state.forward(IDS[:20])
    np.testing.assert_array_equal(state.step(IDS[20:]), expected)


def test_a_base_without_such_a_cache_and_a_device_without_its_kernels_are_refused_by_name(base: Exported) -> None:

    with pytest.raises(GenerationError, match="has no decoder with a KV cache in int8, it has: float32; export"):
        decoder_graph(dataclasses.replace(base.spec, kv_graphs={}), CPU, kv_cache="int8")
    cuda = Device("cuda", ("CUDAExecutionProvider",), "for a test")
    with pytest.raises(GenerationError, match="a KV cache in int8 runs on a CPU only, and the device is cuda"):
        decoder_graph(base.spec, cuda, kv_cache="int8")
