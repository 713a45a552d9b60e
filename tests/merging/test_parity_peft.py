"""The paper methods give what PEFT's `add_weighted_adapter` gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from edgecompose.bundle.adapter import Adapter
from edgecompose.bundle.quantization import Bits, dequantize
from edgecompose.bundle.specs import SlotGroup
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import method_of
from edgecompose.merging.sparsify import MAGNITUDE, random_mask
from edgecompose.settings import MergeSettings
from tests import oracle
from tests.factories import make_adapter

_REASON = "parity with PEFT needs the packages of edgecompose-export"
torch = pytest.importorskip("torch", reason=_REASON)
peft = pytest.importorskip("peft", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)

LAYERS = 2
_PLACE = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)$")
#: (hidden, intermediate): with 4 heads and 2 key-value heads.
SHAPES = [(32, 64), (48, 40), (64, 96)]
WEIGHTS = (0.7, -0.4, 1.3)
SETTINGS = {
    "linear": MergeSettings("linear"),
    "cat": MergeSettings("cat"),
    "magnitude_prune": MergeSettings("magnitude_prune", 0.35),
    "ties total": MergeSettings("ties", 0.5, "total"),
    "ties frequency": MergeSettings("ties", 0.5, "frequency"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _groups(hidden: int, intermediate: int) -> tuple[SlotGroup, ...]:
    return (
        SlotGroup("q_proj", LAYERS, hidden, hidden),
        SlotGroup("k_proj", LAYERS, hidden, hidden // 2),
        SlotGroup("gate_proj", LAYERS, hidden, intermediate),
        SlotGroup("down_proj", LAYERS, intermediate, hidden),
    )


def _peft_model(hidden: int, intermediate: int, adapters: Sequence[Adapter]) -> Any:
    """A random Llama with the dequantised factors and the scaling of each adapter."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    for adapter in adapters:
        lora = peft.LoraConfig(r=adapter.rank, target_modules=sorted(adapter.modules))
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter.name, lora)
        else:
            model = peft.get_peft_model(model, lora, adapter_name=adapter.name)
        for layer, name, module in _lora_modules(model, adapter.name):
            part = adapter.modules[name]
            a, b = oracle.factors(part)
            module.lora_A[adapter.name].weight.data = torch.tensor(a[layer].T, dtype=torch.float32)
            module.lora_B[adapter.name].weight.data = torch.tensor(b[layer].T, dtype=torch.float32)
            module.scaling[adapter.name] = float(part.scaling[layer])
    return model


def _lora_modules(model: Any, adapter: str) -> Iterator[tuple[int, str, Any]]:
    for path, module in model.named_modules():
        place = _PLACE.search(path)
        if place and adapter in getattr(module, "lora_A", {}):
            yield int(place[1]), place[2], module


def _assert_parity(merger: Merger, model: Any, adapters: Sequence[Adapter], settings: MergeSettings) -> None:
    weights = WEIGHTS[: len(adapters)]
    target = f"{settings.method}_{settings.majority_sign}"
    model.add_weighted_adapter(
        [a.name for a in adapters],
        list(weights),
        target,
        combination_type=settings.method,
        density=settings.density,
        majority_sign_method=settings.majority_sign,
    )
    merged = merger.merge(adapters, weights, settings)
    factors, seen = merged.factors(), 0
    for layer, name, module in _lora_modules(model, target):
        assert module.scaling[target] == 1
        result = merged.modules[name]
        wanted_a = module.lora_A[target].weight.data.numpy().T
        wanted_b = module.lora_B[target].weight.data.numpy().T
        # an adapter without this module leaves zero ranks in PEFT's 'cat'; ours has none
        assert not wanted_a[:, result.rank :].any()
        for ours, theirs in (
            (factors[name][0][layer].T, wanted_a[:, : result.rank]),
            (factors[name][1][layer], wanted_b[: result.rank]),
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())
        seen += 1
    assert seen == LAYERS * len(merged.modules) > 0


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def trained(request: pytest.FixtureRequest) -> tuple[Any, list[Adapter]]:
    """Three adapters of one rank on a model, whose layers they scale differently."""
    hidden, intermediate = request.param
    scalings = ([2.0, 0.5], [1.0, 1.0], [0.25, 3.0])
    adapters = [
        make_adapter(f"adapter{i}", groups=_groups(hidden, intermediate), rank=4, scaling=scaling)
        for i, scaling in enumerate(scalings)
    ]
    return _peft_model(hidden, intermediate, adapters), adapters


@pytest.mark.parametrize("method", SETTINGS)
def test_parity(merger: Merger, trained: tuple[Any, list[Adapter]], method: str) -> None:
    model, adapters = trained
    if method_of(SETTINGS[method]).sparsify is MAGNITUDE:  # the oracle refuses values that tie at the threshold
        for name in adapters[0].modules:
            oracle.merge([(a.modules[name], 1.0) for a in adapters], SETTINGS[method])
    _assert_parity(merger, model, adapters, SETTINGS[method])


@pytest.mark.parametrize("bits", [4, 8])
def test_parity_where_adapters_target_different_modules(merger: Merger, bits: Bits) -> None:
    groups = _groups(32, 64)
    adapters = [make_adapter("one", groups=groups[:2], bits=bits), make_adapter("two", groups=groups[1:], bits=bits)]
    model = _peft_model(32, 64, adapters)
    for method in ("linear", "cat"):
        _assert_parity(merger, model, adapters, SETTINGS[method])


def test_parity_of_cat_with_mixed_ranks(merger: Merger) -> None:
    groups = _groups(32, 64)
    adapters = [make_adapter("one", groups=groups, rank=2), make_adapter("two", groups=groups, rank=5)]
    _assert_parity(merger, _peft_model(32, 64, adapters), adapters, SETTINGS["cat"])


@pytest.mark.parametrize(
    "settings",
    [
        MergeSettings("dare_linear", 0.6, dare_seed=3),
        MergeSettings("dare_ties", 0.7, "total", dare_seed=4),
        MergeSettings("dare_ties", 0.7, "frequency"),
    ],
    ids=lambda s: f"{s.method} {s.majority_sign}",
)
def test_parity_of_dare_where_peft_drops_what_we_drop(
    merger: Merger, monkeypatch: pytest.MonkeyPatch, settings: MergeSettings
) -> None:
    adapters = [make_adapter(f"adapter{i}", groups=_groups(32, 64), rank=4) for i in range(3)]
    masks = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            key = f"{adapter.digest}/{name}/drop/{settings.density}/{settings.dare_seed}"
            for side, factor in (("A", dequantize(module.a)), ("B", dequantize(module.b))):
                remaining = random_mask(factor.shape, settings.density, f"{key}/{side}")
                for values, mask in zip(factor, remaining, strict=True):
                    stored, drawn = (values, mask) if side == "A" else (values.T, mask.T)
                    masks[np.ascontiguousarray(stored).tobytes()] = np.ascontiguousarray(drawn)

    def same_mask(tensor: Any, density: float, rescale: bool) -> Any:
        assert rescale
        return tensor * torch.from_numpy(masks[tensor.contiguous().numpy().tobytes()]) / density

    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", same_mask)
    _assert_parity(merger, _peft_model(32, 64, adapters), adapters, settings)


def test_parity_of_svd(merger: Merger) -> None:
    adapters = [make_adapter(f"adapter{i}", groups=_groups(32, 64), rank=4) for i in range(3)]
    model = _peft_model(32, 64, adapters)
    model.add_weighted_adapter([a.name for a in adapters], list(WEIGHTS), "svd", combination_type="svd", svd_rank=6)
    factors = merger.merge(adapters, WEIGHTS, MergeSettings("svd", rank=6)).factors()
    for layer, name, module in _lora_modules(model, "svd"):
        expected = (module.lora_B["svd"].weight @ module.lora_A["svd"].weight).detach().numpy()
        a, b = factors[name]
        np.testing.assert_allclose((a[layer].T @ b[layer]).T, expected, atol=1e-3 * np.abs(expected).max())
