"""Exported bases give the logits of transformers, with and without adapters, however a sequence is fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")

import peft
import torch
import transformers

from edgecompose.bundle.adapter import Adapter
from edgecompose.bundle.quantization import dequantize
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.formats.architectures import PACKED
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from edgecompose_export.base.spec import read_base_spec
from edgecompose_export.calibration.prompts import calibration_prompts
from tests import tiny
from tests.export.decoders import IDS, NO_ADAPTER, Float, difference, load_exported, logits_of, open_decoder
from tests.fixtures_tiny import Exported, TinyZoo

pytestmark = pytest.mark.slow

TOLERANCE = 1e-3


@pytest.fixture(params=list(tiny.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(zoo: TinyZoo, architecture: str) -> Exported:
    return zoo.base(architecture)


def torch_logits(model: Any, ids: Sequence[int] = IDS) -> Float:
    with torch.no_grad():
        return np.asarray(model.eval()(torch.tensor([ids])).logits[0].float().numpy())


def load_model(folder: Path) -> Any:
    """With eager attention: the others leave Gemma 2's soft caps out."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, attn_implementation="eager", dtype=torch.float32
    )


def put_factors(model: Any, name: str, adapter: Adapter) -> None:
    """Give a PEFT adapter the very factors that a quantised one stands for; its scale stays PEFT's."""
    for path, module in model.named_modules():
        if name not in getattr(module, "lora_A", {}):
            continue
        layer, kind = int(path.split(".layers.")[1].split(".")[0]), path.rsplit(".", 1)[1]
        kind = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}.get(kind, kind)  # Granite 4
        parts = [adapter.modules[part] for part in PACKED.get(kind, (kind,))]
        a, b = dequantize(parts[0].a)[layer], np.concatenate([dequantize(p.b)[layer] for p in parts], axis=1)
        module.lora_A[name].weight.data = torch.tensor(a)
        module.lora_B[name].weight.data = torch.tensor(np.ascontiguousarray(b.T))


def test_the_base_alone_gives_the_logits_of_transformers(zoo: TinyZoo, architecture: str, base: Exported) -> None:
    expected = torch_logits(load_model(zoo.model(architecture)))
    assert np.ptp(expected) > 1
    assert difference(logits_of(open_decoder(base)), expected) <= TOLERANCE


def test_every_linear_module_has_a_slot(base: Exported, architecture: str) -> None:
    names = {group.name for group in base.spec.slots}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {group.layers for group in base.spec.slots} == {{"gemma3_text": 6, "smollm3": 4}.get(architecture, 2)}
    assert read_base_spec(base.folder) == base.spec
    assert not list(base.folder.glob(".build-*"))


def test_an_adapter_gives_the_logits_of_peft(
    zoo: TinyZoo, architecture: str, base: Exported, merger: Merger, tmp_path: Path
) -> None:
    lora = zoo.lora("one", architecture)
    adapter = load_exported(lora, base, tmp_path / "one.safetensors")
    model = peft.PeftModel.from_pretrained(load_model(zoo.model(architecture)), lora, adapter_name="one")
    put_factors(model, "one", adapter)
    result = logits_of(open_decoder(base), IDS, merger.merge([adapter], [1.0], MergeSettings()))
    assert difference(result, torch_logits(model)) <= TOLERANCE
    assert difference(result, logits_of(open_decoder(base))) > 0.01 * np.ptp(result)


def test_two_adapters_give_the_logits_of_peft_cat(
    zoo: TinyZoo, architecture: str, base: Exported, merger: Merger, tmp_path: Path
) -> None:
    loras = [zoo.lora("one", architecture), zoo.lora("two", architecture, r=3, use_rslora=True)]
    adapters = [load_exported(lora, base, tmp_path / f"{lora.name}.safetensors") for lora in loras]
    model = peft.PeftModel.from_pretrained(load_model(zoo.model(architecture)), loras[0], adapter_name="one")
    model.load_adapter(loras[1], "two")
    for adapter in adapters:
        put_factors(model, adapter.name, adapter)
    model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "both", combination_type="cat")
    model.set_adapter("both")
    result = logits_of(open_decoder(base), IDS, merger.merge(adapters, [0.7, -0.4], MergeSettings("product")))
    assert difference(result, torch_logits(model)) <= TOLERANCE


def test_a_packed_projection_gets_its_slots(zoo: TinyZoo, tmp_path: Path) -> None:
    lora = zoo.lora("packed", "phi3", target_modules=["qkv_proj"])
    adapter = load_exported(lora, zoo.base("phi3"), tmp_path / "packed.safetensors")
    widths = {name: (module.a.width, module.b.width) for name, module in adapter.modules.items()}
    assert widths == {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32)}
    first = [adapter.modules[name].a.codes for name in widths]
    assert all(np.array_equal(first[0], codes) for codes in first)


@pytest.fixture
def adapted(zoo: TinyZoo, base: Exported, architecture: str, merger: Merger, tmp_path: Path) -> MergedAdapter:
    adapter = load_exported(zoo.lora("one", architecture), base, tmp_path / "one.safetensors")
    return merger.merge([adapter], [0.8], MergeSettings())


@pytest.mark.parametrize("chunks", [[39, 1], [1] * 40, [12, 21, 7], [30, 1, 1, 8]], ids=str)
def test_chunks_give_what_one_prefill_gives(base: Exported, adapted: MergedAdapter, chunks: list[int]) -> None:
    decoder = open_decoder(base)
    decoding, rows, start = decoder.start(adapted, len(IDS) + 3), [], 0
    for count in chunks:
        rows.append(decoding.forward(IDS[start : start + count], rows=count).copy())
        start += count
    assert difference(np.concatenate(rows), logits_of(decoder, IDS, adapted)) <= 1e-4


def test_a_rewound_sequence_forgets(base: Exported, adapted: MergedAdapter) -> None:
    decoder = open_decoder(base)
    decoding = decoder.start(adapted, len(IDS))
    decoding.forward(IDS[:25])
    decoding.forward(list(reversed(IDS[:15])))
    decoding.rewind(25)
    rows = decoding.forward(IDS[25:], rows=15)
    assert decoding.length == len(IDS)
    assert difference(rows, logits_of(decoder, IDS, adapted)[25:]) <= 1e-4


@pytest.mark.parametrize("remaining", [1, 2, 40])
def test_only_the_kept_positions_have_logits(base: Exported, remaining: int) -> None:
    decoder = open_decoder(base)
    result = decoder.start(NO_ADAPTER, len(IDS)).forward(IDS, rows=remaining)
    assert difference(result, logits_of(decoder)[-remaining:]) <= 1e-5


def test_two_sequences_do_not_disturb_each_other(zoo: TinyZoo, merger: Merger, tmp_path: Path) -> None:
    base = zoo.base("llama")
    adapter = load_exported(zoo.lora("one"), base, tmp_path / "one.safetensors")
    merged = merger.merge([adapter], [1.0], MergeSettings())
    decoder = open_decoder(base)
    plain, blend = decoder.start(NO_ADAPTER, 40), decoder.start(merged, 40)
    for token in IDS[:-1]:
        plain.forward([token])
        blend.forward([token])
    assert difference(plain.forward(IDS[-1:]), logits_of(decoder)[-1:]) <= 1e-4
    assert difference(blend.forward(IDS[-1:]), logits_of(decoder, IDS, merged)[-1:]) <= 1e-4


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_base_records_its_distance(zoo: TinyZoo, precision: str, tied: bool) -> None:
    exact, near = (zoo.base("qwen2" if tied else "llama", p) for p in ("fp32", precision))
    own, distance = exact.spec.distance, near.spec.distance
    assert own is not None and distance is not None
    assert own.kl < 1e-6 and own.nll == pytest.approx(own.nll_float, abs=1e-4)
    assert distance.prompts == len(calibration_prompts())
    assert distance.positions > distance.prompts
    assert 0 <= distance.kl < {"fp16": 1e-5, "int8": 0.01, "int4": 0.2}[precision]
    assert {"fp16": 0.99, "int8": 0.9, "int4": 0.5}[precision] < distance.top1 <= 1
    assert near.spec.precision == precision
    alike = dataclasses.replace(near.spec, precision="fp32", distance=own, fusing=exact.spec.fusing)
    assert alike == exact.spec
    assert near.spec.fusing == (exact.spec.fusing if precision == "fp16" else None)
    sizes = [sum(path.stat().st_size for path in base.folder.glob("decoder.onnx*")) for base in (exact, near)]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_quantised_base_takes_adapters(zoo: TinyZoo, precision: str, merger: Merger, tmp_path: Path) -> None:
    """The slots compute in float32 beside whatever precision the base has."""
    exact, near = zoo.base("llama"), zoo.base("llama", precision)
    adapter = load_exported(zoo.lora("one"), near, tmp_path / "one.safetensors")
    merged = merger.merge([adapter], [1.0], MergeSettings())
    effect = logits_of(open_decoder(exact), IDS, merged) - logits_of(open_decoder(exact))
    result = logits_of(open_decoder(near), IDS, merged) - logits_of(open_decoder(near))
    assert np.corrcoef(effect.ravel(), result.ravel())[0, 1] > 0.85


@pytest.mark.parametrize("remaining", [1, 3, 4, 5, 9, 18])
def test_a_long_prompt_is_read_in_chunks(zoo: TinyZoo, remaining: int) -> None:
    exported = zoo.base("llama", "fp32")
    decoder = Decoder(exported.folder / exported.spec.graph, exported.spec, choose_device("cpu"))
    ids = [5 + 7 * i % 90 for i in range(18)]
    whole = decoder.start(MergedAdapter({}, "whole"), 30)
    expected = whole.forward(ids, rows=remaining).copy()
    later = whole.forward([9, 10]).copy()
    chunks = decoder.start(MergedAdapter({}, "pieces"), 30)
    chunks._chunk = 4
    result = chunks.forward(ids, rows=remaining)
    assert result.shape == expected.shape == (remaining, exported.spec.vocabulary)
    np.testing.assert_allclose(result, expected, atol=2e-5)
    assert chunks.tokens == whole.tokens[:18]
    np.testing.assert_allclose(chunks.forward([9, 10]), later, atol=2e-5)
