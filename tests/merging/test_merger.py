"""Merging against a numpy oracle, the laws of the exact method, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.bundle.adapter import LARGEST_ENTRY, Adapter, load_adapter
from edgecompose.bundle.specs import LARGEST_WEIGHT
from edgecompose.errors import MergeError
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import METHODS, composition_digest, method_of
from edgecompose.request import Request
from edgecompose.settings import MergeSettings
from tests import oracle
from tests.factories import BASE, GROUPS, WIDE, adapter_of, make_adapter, write_adapter
from tests.merging.merged import BITS, WEIGHTS, Float, arrays_of, assert_close, deltas, make_adapters

SETTINGS = {
    "product": MergeSettings("product"),
    "cat": MergeSettings("cat"),
    "linear": MergeSettings("linear"),
    "magnitude_prune": MergeSettings("magnitude_prune", 0.35),
    "ties total": MergeSettings("ties", 0.4, "total"),
    "ties frequency": MergeSettings("ties", 0.6, "frequency"),
    "ties unpruned": MergeSettings("ties", 1.0, "total"),
}
FACTOR_WISE = [name for name, row in METHODS.items() if row.plan == "entrywise"]


def _assert_as_oracle(merger: Merger, adapters: Sequence[Adapter], settings: MergeSettings) -> None:
    weights = WEIGHTS[: len(adapters)]
    merged = merger.merge(adapters, weights, settings)
    arrays = arrays_of(merged)
    assert sorted(arrays) == sorted(adapters[0].modules)
    for name, (a, b) in arrays.items():
        parts = [(adapter.modules[name], w) for adapter, w in zip(adapters, weights, strict=True)]
        alone = len(parts) == 1 and method_of(settings).single
        wanted_a, wanted_b = oracle.merge(parts, MergeSettings("linear") if alone else settings)
        assert_close(a, wanted_a)
        assert_close(b, wanted_b)
        assert merged.modules[name].rank == wanted_a.shape[2]
    assert merged.bytes == sum(a.nbytes + b.nbytes for a, b in arrays.values())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_is_as_the_oracle(merger: Merger, method: str, bits: str, count: int) -> None:
    _assert_as_oracle(merger, make_adapters(BITS[bits][:count]), SETTINGS[method])


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_one_adapter_alone_is_not_pruned_as_in_peft(merger: Merger, method: str) -> None:
    adapters = make_adapters([8])
    alone, linear = (merger.merge(adapters, [0.7], MergeSettings(m)) for m in (method, "linear"))
    assert alone.digest == linear.digest
    for name, factors in arrays_of(linear).items():
        for result, expected in zip(arrays_of(alone)[name], factors, strict=True):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["product", "linear"])
def test_blocks_of_every_size_are_as_the_oracle(merger: Merger, method: str, bits: str) -> None:
    _assert_as_oracle(merger, make_adapters(BITS[bits][:3], WIDE), SETTINGS[method])


def test_one_adapter_at_weight_1_is_that_adapter(merger: Merger) -> None:
    (adapter,) = make_adapters([4])
    for name, delta in deltas(merger.merge([adapter], [1.0], MergeSettings())).items():
        assert_close(delta, oracle.delta([(adapter.modules[name], 1.0)]))


@pytest.mark.parametrize("method", ["product", "cat"])
def test_the_exact_sum_does_not_depend_on_the_order(merger: Merger, method: str) -> None:
    adapters, settings = make_adapters(BITS["mixed"][:3]), MergeSettings(method)
    expected = deltas(merger.merge(adapters, WEIGHTS[:3], settings))
    for order in itertools.permutations(range(3)):
        merged = merger.merge([adapters[i] for i in order], [WEIGHTS[i] for i in order], settings)
        for name, delta in deltas(merged).items():
            assert_close(delta, expected[name])


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(-2, 2))
def test_the_exact_sum_is_linear_in_the_weights(merger: Merger, weights: list[float], factor: float) -> None:
    adapters = make_adapters(BITS["mixed"][:2], GROUPS[:1])
    one, other = np.array(weights[:2]), np.array(weights[2:])

    def delta(chosen: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return deltas(merger.merge(adapters, chosen.tolist(), MergeSettings()))["q_proj"].astype(np.float64)

    combined = delta(one + factor * other)
    scale = sum(np.abs(delta(w)).max() for w in np.eye(2)) * (np.abs(one) + abs(factor) * np.abs(other)).max()
    np.testing.assert_allclose(combined, delta(one) + factor * delta(other), rtol=0, atol=1e-5 * scale + 1e-7)


def test_ranks_may_differ_under_the_exact_method(merger: Merger) -> None:
    adapters = [make_adapter("small", rank=2, bits=4), make_adapter("large", rank=8), make_adapter("middle", rank=5)]
    merged = merger.merge(adapters, WEIGHTS[:3], MergeSettings())
    for name, delta in deltas(merged).items():
        assert_close(delta, oracle.delta([(a.modules[name], w) for a, w in zip(adapters, WEIGHTS, strict=False)]))
        assert merged.modules[name].rank == 15


def test_weights_that_cancel_give_no_delta(merger: Merger) -> None:
    adapters = [make_adapter("one"), Adapter("twin", make_adapter("one").modules, 8, "b", "another digest")]
    alone = deltas(merger.merge(adapters[:1], [0.6], MergeSettings()))
    for name, delta in deltas(merger.merge(adapters, [0.6, -0.6], MergeSettings())).items():
        assert np.abs(delta).max() <= 1e-6 * np.abs(alone[name]).max()


@pytest.mark.parametrize("method", METHODS)
def test_weight_0_gives_no_delta(merger: Merger, method: str) -> None:
    for delta in deltas(merger.merge(make_adapters([8]), [0.0], MergeSettings(method))).values():
        assert not delta.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_an_adapter_leaves_alone_stays_alone(merger: Merger, method: str) -> None:
    adapter = make_adapter("one", scaling=[1.0, 0.0, 2.0])
    for delta in deltas(merger.merge([adapter], [1.0], MergeSettings(method))).values():
        assert [bool(layer.any()) for layer in delta] == [True, False, True]


def test_no_adapter_is_the_base_alone(merger: Merger) -> None:
    merged = merger.merge([], [], MergeSettings())
    assert (dict(merged.modules), merged.bytes) == ({}, 0)


@pytest.mark.parametrize("method", ["product", "cat", "linear", "magnitude_prune", "ties"])
def test_a_module_that_one_adapter_lacks_comes_from_the_others(merger: Merger, method: str) -> None:
    full, part = make_adapter("full"), make_adapter("part", groups=GROUPS[:1])
    settings = MergeSettings(method, 0.35)
    arrays = arrays_of(merger.merge([part, full], [0.5, 0.8], settings))
    assert sorted(arrays) == sorted(full.modules)
    both = [(part.modules["q_proj"], 0.5), (full.modules["q_proj"], 0.8)]
    for name, parts in {"q_proj": both, "k_proj": [(full.modules["k_proj"], 0.8)]}.items():
        for result, expected in zip(arrays[name], oracle.merge(parts, settings), strict=True):
            assert_close(result, expected)


def test_density_1_prunes_nothing(merger: Merger) -> None:
    adapters = make_adapters(BITS["mixed"][:3])
    pruned = arrays_of(merger.merge(adapters, WEIGHTS[:3], MergeSettings("magnitude_prune", 1.0)))
    for name, factors in arrays_of(merger.merge(adapters, WEIGHTS[:3], MergeSettings("linear"))).items():
        for result, expected in zip(pruned[name], factors, strict=True):
            assert_close(result, expected)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.999])
def test_a_density_keeps_its_share_of_every_layer(merger: Merger, density: float) -> None:
    adapter = make_adapter("one", groups=WIDE[:1], bits=4)  # values tie: whichever is kept, the number is right
    silent = make_adapter("two", groups=WIDE[:1], bits=4)  # at weight 0 it adds nothing
    settings = MergeSettings("magnitude_prune", density)
    factors = arrays_of(merger.merge([adapter, silent], [1.0, 0.0], settings))["o_proj"]
    for result, whole in zip(factors, oracle.factors(adapter.modules["o_proj"]), strict=True):
        for layer, values in zip(result, whole, strict=True):
            assert np.count_nonzero(layer) == min(int(density * layer.size), np.count_nonzero(values))


@pytest.mark.parametrize("method", ["magnitude_prune", "ties"])
def test_a_density_that_keeps_nothing_is_refused(merger: Merger, method: str) -> None:
    adapters = make_adapters([8, 8], GROUPS[:1])
    with pytest.raises(MergeError, match="density 0.001 keeps none of 96 entries") as caught:
        merger.merge(adapters, [0.5, 0.5], MergeSettings(method, 0.001))
    advice = float(str(caught.value).rsplit(" ", 1)[1])
    assert merger.merge(adapters, [0.5, 0.5], MergeSettings(method, advice)).modules


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e300, 1.7e308, -1.1e6])
def test_weights_beyond_float32_are_refused(merger: Merger, weight: float) -> None:
    with pytest.raises(MergeError, match="adapter1"):
        merger.merge(make_adapters([8, 8]), [0.5, weight], MergeSettings())
    with pytest.raises(MergeError, match=r"beyond 1e\+06: adapter1="):
        composition_digest({"adapter1": "a" * 64}, {"adapter1": weight}, MergeSettings())


def _loud(adapter: Adapter, **changes: float) -> Adapter:
    """An adapter that reading would have refused: some numbers are as large as float32 allows."""
    module = adapter.modules["q_proj"]
    gain, scaling = changes.get("gain", module.a.gain), changes.get("scaling")
    scalings = module.scaling if scaling is None else np.full_like(module.scaling, scaling)
    loud = replace(module, a=replace(module.a, gain=gain), scaling=scalings)
    return replace(adapter, modules={**adapter.modules, "q_proj": loud}, digest=f"{gain}{scaling}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", ["svd", "core_ties", "core_prune"])
@pytest.mark.parametrize("changes", [{"gain": 1e30}, {"gain": math.inf}, {"gain": math.nan}, {"scaling": 3e38}])
def test_numbers_that_no_decomposition_takes_are_one_error(
    merger: Merger, method: str, changes: dict[str, float]
) -> None:
    one, other = make_adapters([8, 8])
    settings = MergeSettings(method, rank=2) if method == "svd" else MergeSettings(method)
    with pytest.raises(MergeError, match=f"adapters adapter0, adapter1 cannot be merged by {method}: .*; use other"):
        merger.merge([_loud(one, **changes), other], [0.5, 0.5], settings)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_norm_that_is_not_finite_is_one_error(merger: Merger) -> None:
    one, other = make_adapters([8, 8])
    for method in ("product", "ties"):
        with pytest.raises(MergeError, match="norm of the blend is not finite"):
            merger.merge([_loud(one, gain=1e30), other], [0.5, 0.5], MergeSettings(method, norm_guard=True))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_largest_numbers_that_are_read_give_a_finite_blend(merger: Merger, method: str, tmp_path: Path) -> None:
    """At the bounds of entries, scalings and weights together."""
    adapters = []
    for adapter in make_adapters([8, 8], GROUPS):
        modules = {
            name: replace(
                module,
                a=replace(module.a, gain=LARGEST_ENTRY / 128),
                b=replace(module.b, gain=-LARGEST_ENTRY / 128),
                scaling=np.full_like(module.scaling, LARGEST_WEIGHT),
            )
            for name, module in adapter.modules.items()
        }
        path = write_adapter(tmp_path / "x.safetensors", replace(adapter, modules=modules))
        adapters.append(load_adapter(path, adapter.name, GROUPS, BASE))
    merged = merger.merge(adapters, [LARGEST_WEIGHT, -LARGEST_WEIGHT], MergeSettings(method))
    for a, b in merged.factors().values():
        assert np.isfinite(a).all() and np.isfinite(b).all()
        assert np.isfinite(np.einsum("lri,lro->lio", a, b)).all()


def test_an_adapter_named_twice_is_refused(merger: Merger) -> None:
    with pytest.raises(MergeError, match="twice in adapter0, adapter0"):
        merger.merge(make_adapters([8]) * 2, [0.5, 0.5], MergeSettings())


@pytest.mark.parametrize("weights", [[], [0.5], [0.5, 0.5, 0.5]])
def test_each_adapter_needs_a_weight(merger: Merger, weights: list[float]) -> None:
    with pytest.raises(MergeError, match=f"2 adapters came with {len(weights)} weights"):
        merger.merge(make_adapters([8, 8]), weights, MergeSettings())


@pytest.mark.parametrize("method", ["average", "", "PRODUCT"])
def test_an_unknown_method_is_refused(merger: Merger, method: str) -> None:
    for merge in (MergeSettings(method), {"method": method}):
        with pytest.raises(MergeError, match=f"use one of {', '.join(METHODS)}"):
            Request(merge=merge)
    with pytest.raises(MergeError, match=f"use one of {', '.join(METHODS)}"):
        merger.merge(make_adapters([8, 8]), [0.5, 0.5], MergeSettings(method))


@pytest.mark.parametrize("density", [0.0, -0.5, 1.1, math.nan])
def test_a_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(MergeError, match="density"):
        MergeSettings("ties", density)


def test_an_unknown_majority_sign_is_refused() -> None:
    with pytest.raises(MergeError, match="'mean'"):
        MergeSettings("ties", majority_sign="mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", FACTOR_WISE)
def test_factor_wise_methods_refuse_mixed_ranks(merger: Merger, method: str) -> None:
    adapters = [make_adapter("small", rank=2), make_adapter("large", rank=8)]
    with pytest.raises(MergeError, match=r"'down_proj' has ranks \[2, 8\].*use method product or cat"):
        merger.merge(adapters, [0.5, 0.5], MergeSettings(method))


def test_the_sum_does_not_depend_on_how_the_product_is_factored_but_linear_does(merger: Merger) -> None:
    rng = np.random.default_rng(0)
    one, other = ({"q_proj": _factors(rng)} for _ in range(2))
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    a, b = one["q_proj"]
    turned = {"q_proj": ((a @ turn).astype(np.float32), (turn.T @ b).astype(np.float32))}
    fixed = adapter_of("other", other)
    change = {}
    for method in ("product", "linear"):
        before, after = (
            deltas(merger.merge([adapter_of("one", factors), fixed], [0.5, 0.5], MergeSettings(method)))["q_proj"]
            for factors in (one, turned)
        )
        change[method] = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    assert change["product"] < 0.02  # what 8 bits leave
    assert change["linear"] > 0.3


def _factors(rng: np.random.Generator) -> tuple[Float, Float]:
    return rng.normal(size=(2, 32, 4)).astype(np.float32), rng.normal(size=(2, 4, 64)).astype(np.float32)
