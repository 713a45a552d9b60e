"""Merging against a numpy oracle, the laws of the exact method, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.bundle.adapter import Adapter
from edgecompose.bundle.quantization import Bits
from edgecompose.bundle.specs import SlotGroup
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import MergeError
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import METHODS, composition_digest, method_of
from edgecompose.request import Request
from edgecompose.settings import MergeSettings
from tests import oracle
from tests.factories import GROUPS, WIDE, adapter_of, make_adapter

Float = npt.NDArray[np.float32]
WEIGHTS = (0.7, -0.4, 0.25, 1.3)
BITS: dict[str, tuple[Bits, ...]] = {"int4": (4, 4, 4, 4), "int8": (8, 8, 8, 8), "mixed": (8, 4, 4, 8)}
SETTINGS = {
    "product": MergeSettings("product"),
    "cat": MergeSettings("cat"),
    "linear": MergeSettings("linear"),
    "magnitude_prune": MergeSettings("magnitude_prune", 0.35),
    "ties total": MergeSettings("ties", 0.4, "total"),
    "ties frequency": MergeSettings("ties", 0.6, "frequency"),
    "ties unpruned": MergeSettings("ties", 1.0, "total"),
}
PAPER = [name for name, row in METHODS.items() if row.plan == "entrywise"]
SCALINGS = ([2.0, 0.5, 1.0], [1.5, 1.5, 1.5], [0.1, 4.0, 1.0], [1.0, 2.0, 3.0])


def _adapters(bits: Sequence[Bits], groups: Sequence[SlotGroup] = GROUPS) -> list[Adapter]:
    return [
        make_adapter(f"adapter{i}", groups=groups, bits=b, scaling=SCALINGS[i][: groups[0].layers])
        for i, b in enumerate(bits)
    ]


def _arrays(merged: MergedAdapter) -> dict[str, tuple[Float, Float]]:
    return {name: (a.transpose(0, 2, 1), b) for name, (a, b) in merged.factors().items()}


def _deltas(merged: MergedAdapter) -> dict[str, Float]:
    return {name: np.matmul(a, b) for name, (a, b) in _arrays(merged).items()}


def _assert_close(found: npt.NDArray[np.floating], wanted: npt.NDArray[np.floating], tolerance: float = 2e-6) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(float(np.abs(wanted).max()), 1e-6))


def _assert_as_oracle(merger: Merger, adapters: Sequence[Adapter], settings: MergeSettings) -> None:
    weights = WEIGHTS[: len(adapters)]
    merged = merger.merge(adapters, weights, settings)
    arrays = _arrays(merged)
    assert sorted(arrays) == sorted(adapters[0].modules)
    for name, (a, b) in arrays.items():
        parts = [(adapter.modules[name], w) for adapter, w in zip(adapters, weights, strict=True)]
        alone = len(parts) == 1 and method_of(settings).single
        wanted_a, wanted_b = oracle.merge(parts, MergeSettings("linear") if alone else settings)
        _assert_close(a, wanted_a)
        _assert_close(b, wanted_b)
        assert merged.modules[name].rank == wanted_a.shape[2]
    assert merged.bytes == sum(a.nbytes + b.nbytes for a, b in arrays.values())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_is_as_the_oracle(merger: Merger, method: str, bits: str, count: int) -> None:
    _assert_as_oracle(merger, _adapters(BITS[bits][:count]), SETTINGS[method])


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_one_adapter_alone_is_not_pruned_as_in_peft(merger: Merger, method: str) -> None:
    adapters = _adapters([8])
    alone, linear = (merger.merge(adapters, [0.7], MergeSettings(m)) for m in (method, "linear"))
    assert alone.digest == linear.digest
    for name, factors in _arrays(linear).items():
        for found, wanted in zip(_arrays(alone)[name], factors, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["product", "linear"])
def test_blocks_of_every_size_are_as_the_oracle(merger: Merger, method: str, bits: str) -> None:
    _assert_as_oracle(merger, _adapters(BITS[bits][:3], WIDE), SETTINGS[method])


def test_one_adapter_at_weight_1_is_that_adapter(merger: Merger) -> None:
    (adapter,) = _adapters([4])
    for name, delta in _deltas(merger.merge([adapter], [1.0], MergeSettings())).items():
        _assert_close(delta, oracle.delta([(adapter.modules[name], 1.0)]))


@pytest.mark.parametrize("method", ["product", "cat"])
def test_the_exact_sum_does_not_depend_on_the_order(merger: Merger, method: str) -> None:
    adapters, settings = _adapters(BITS["mixed"][:3]), MergeSettings(method)
    wanted = _deltas(merger.merge(adapters, WEIGHTS[:3], settings))
    for order in itertools.permutations(range(3)):
        merged = merger.merge([adapters[i] for i in order], [WEIGHTS[i] for i in order], settings)
        for name, delta in _deltas(merged).items():
            _assert_close(delta, wanted[name])


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(-2, 2))
def test_the_exact_sum_is_linear_in_the_weights(merger: Merger, weights: list[float], factor: float) -> None:
    adapters = _adapters(BITS["mixed"][:2], GROUPS[:1])
    one, other = np.array(weights[:2]), np.array(weights[2:])

    def delta(chosen: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return _deltas(merger.merge(adapters, chosen.tolist(), MergeSettings()))["q_proj"].astype(np.float64)

    combined = delta(one + factor * other)
    scale = sum(np.abs(delta(w)).max() for w in np.eye(2)) * (np.abs(one) + abs(factor) * np.abs(other)).max()
    np.testing.assert_allclose(combined, delta(one) + factor * delta(other), rtol=0, atol=1e-5 * scale + 1e-7)


def test_ranks_may_differ_under_the_exact_method(merger: Merger) -> None:
    adapters = [make_adapter("small", rank=2, bits=4), make_adapter("large", rank=8), make_adapter("middle", rank=5)]
    merged = merger.merge(adapters, WEIGHTS[:3], MergeSettings())
    for name, delta in _deltas(merged).items():
        _assert_close(delta, oracle.delta([(a.modules[name], w) for a, w in zip(adapters, WEIGHTS, strict=False)]))
        assert merged.modules[name].rank == 15


def test_weights_that_cancel_give_no_delta(merger: Merger) -> None:
    adapters = [make_adapter("one"), Adapter("twin", make_adapter("one").modules, 8, "b", "another digest")]
    alone = _deltas(merger.merge(adapters[:1], [0.6], MergeSettings()))
    for name, delta in _deltas(merger.merge(adapters, [0.6, -0.6], MergeSettings())).items():
        assert np.abs(delta).max() <= 1e-6 * np.abs(alone[name]).max()


@pytest.mark.parametrize("method", METHODS)
def test_weight_0_gives_no_delta(merger: Merger, method: str) -> None:
    for delta in _deltas(merger.merge(_adapters([8]), [0.0], MergeSettings(method))).values():
        assert not delta.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_an_adapter_leaves_alone_stays_alone(merger: Merger, method: str) -> None:
    adapter = make_adapter("one", scaling=[1.0, 0.0, 2.0])
    for delta in _deltas(merger.merge([adapter], [1.0], MergeSettings(method))).values():
        assert [bool(layer.any()) for layer in delta] == [True, False, True]


def test_no_adapter_is_the_base_alone(merger: Merger) -> None:
    merged = merger.merge([], [], MergeSettings())
    assert (dict(merged.modules), merged.bytes) == ({}, 0)


@pytest.mark.parametrize("method", ["product", "cat", "linear", "magnitude_prune", "ties"])
def test_a_module_that_one_adapter_lacks_comes_from_the_others(merger: Merger, method: str) -> None:
    full, part = make_adapter("full"), make_adapter("part", groups=GROUPS[:1])
    settings = MergeSettings(method, 0.35)
    arrays = _arrays(merger.merge([part, full], [0.5, 0.8], settings))
    assert sorted(arrays) == sorted(full.modules)
    both = [(part.modules["q_proj"], 0.5), (full.modules["q_proj"], 0.8)]
    for name, parts in {"q_proj": both, "k_proj": [(full.modules["k_proj"], 0.8)]}.items():
        for found, wanted in zip(arrays[name], oracle.merge(parts, settings), strict=True):
            _assert_close(found, wanted)


def test_density_1_prunes_nothing(merger: Merger) -> None:
    adapters = _adapters(BITS["mixed"][:3])
    pruned = _arrays(merger.merge(adapters, WEIGHTS[:3], MergeSettings("magnitude_prune", 1.0)))
    for name, factors in _arrays(merger.merge(adapters, WEIGHTS[:3], MergeSettings("linear"))).items():
        for found, wanted in zip(pruned[name], factors, strict=True):
            _assert_close(found, wanted)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.999])
def test_a_density_keeps_its_share_of_every_layer(merger: Merger, density: float) -> None:
    adapter = make_adapter("one", groups=WIDE[:1], bits=4)  # values tie: whichever is kept, the number is right
    silent = make_adapter("two", groups=WIDE[:1], bits=4)  # at weight 0 it adds nothing
    settings = MergeSettings("magnitude_prune", density)
    factors = _arrays(merger.merge([adapter, silent], [1.0, 0.0], settings))["o_proj"]
    for found, whole in zip(factors, oracle.factors(adapter.modules["o_proj"]), strict=True):
        for layer, values in zip(found, whole, strict=True):
            assert np.count_nonzero(layer) == min(int(density * layer.size), np.count_nonzero(values))


@pytest.mark.parametrize("method", ["magnitude_prune", "ties"])
def test_a_density_that_keeps_nothing_is_refused(merger: Merger, method: str) -> None:
    adapters = _adapters([8, 8], GROUPS[:1])
    with pytest.raises(MergeError, match="density 0.001 keeps none of 96 entries") as caught:
        merger.merge(adapters, [0.5, 0.5], MergeSettings(method, 0.001))
    advice = float(str(caught.value).rsplit(" ", 1)[1])
    assert merger.merge(adapters, [0.5, 0.5], MergeSettings(method, advice)).modules


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e300])
def test_weights_beyond_float32_are_refused(merger: Merger, weight: float) -> None:
    with pytest.raises(MergeError, match="adapter1"):
        merger.merge(_adapters([8, 8]), [0.5, weight], MergeSettings())


def test_an_adapter_named_twice_is_refused(merger: Merger) -> None:
    with pytest.raises(MergeError, match="twice in adapter0, adapter0"):
        merger.merge(_adapters([8]) * 2, [0.5, 0.5], MergeSettings())


@pytest.mark.parametrize("weights", [[], [0.5], [0.5, 0.5, 0.5]])
def test_a_weight_for_each_adapter_is_wanted(merger: Merger, weights: list[float]) -> None:
    with pytest.raises(MergeError, match=f"2 adapters came with {len(weights)} weights"):
        merger.merge(_adapters([8, 8]), weights, MergeSettings())


@pytest.mark.parametrize("method", ["average", "", "PRODUCT"])
def test_an_unknown_method_is_refused(merger: Merger, method: str) -> None:
    for merge in (MergeSettings(method), {"method": method}):
        with pytest.raises(MergeError, match=f"use one of {', '.join(METHODS)}"):
            Request(merge=merge)
    with pytest.raises(MergeError, match=f"use one of {', '.join(METHODS)}"):
        merger.merge(_adapters([8, 8]), [0.5, 0.5], MergeSettings(method))


@pytest.mark.parametrize("density", [0.0, -0.5, 1.1, math.nan])
def test_a_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(MergeError, match="density"):
        MergeSettings("ties", density)


def test_an_unknown_majority_sign_is_refused() -> None:
    with pytest.raises(MergeError, match="'mean'"):
        MergeSettings("ties", majority_sign="mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", PAPER)
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
            _deltas(merger.merge([adapter_of("one", factors), fixed], [0.5, 0.5], MergeSettings(method)))["q_proj"]
            for factors in (one, turned)
        )
        change[method] = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    assert change["product"] < 0.02  # what 8 bits leave
    assert change["linear"] > 0.3


def _factors(rng: np.random.Generator) -> tuple[Float, Float]:
    return rng.normal(size=(2, 32, 4)).astype(np.float32), rng.normal(size=(2, 4, 64)).astype(np.float32)


DIGESTS, SHARES = {"one": "1" * 64, "two": "2" * 64}, {"one": 0.6, "two": 0.4}


def _digest(
    method: str = "product", density: float = 0.5, sign: Literal["total", "frequency"] = "total", **weights: float
) -> str:
    return composition_digest(DIGESTS, SHARES | weights, MergeSettings(method, density, sign))


def test_the_digest_does_not_depend_on_the_order() -> None:
    turned = composition_digest(dict(reversed(DIGESTS.items())), dict(reversed(SHARES.items())), MergeSettings())
    assert turned == _digest()
    assert len(turned) == 64


def test_the_digest_tells_blends_apart() -> None:
    blends = [
        _digest(),
        _digest(one=0.600001),
        _digest(one=0.4, two=0.6),
        _digest("linear"),
        _digest("ties"),
        _digest("ties", 0.6),
        _digest("ties", sign="frequency"),
        _digest("magnitude_prune"),
        _digest("magnitude_prune", 0.6),
        composition_digest(DIGESTS | {"two": "3" * 64}, SHARES, MergeSettings()),
        composition_digest({}, {}, MergeSettings()),
    ]
    assert len(set(blends)) == len(blends)


def test_the_digest_ignores_what_the_method_does_not_use() -> None:
    assert _digest(density=0.1) == _digest(density=0.9) == _digest(sign="frequency")
    assert _digest("magnitude_prune", sign="frequency") == _digest("magnitude_prune")
    assert _digest("cat") == _digest("product")
    assert _digest(one=0.6 + 1e-9) == _digest()


def test_a_merge_carries_the_digest_of_its_content(merger: Merger) -> None:
    adapters = _adapters([8, 4])
    digests = {a.name: a.digest for a in adapters}
    wanted = composition_digest(digests, {"adapter0": 0.3, "adapter1": 0.7}, MergeSettings())
    assert merger.merge(adapters, [0.3, 0.7], MergeSettings()).digest == wanted
    assert merger.merge(adapters[::-1], [0.7, 0.3], MergeSettings()).digest == wanted


EXACT = {
    "product": MergeSettings("product"),
    "svd": MergeSettings("svd", rank=64),
    "svd truncated": MergeSettings("svd", rank=5),
    "core_ties": MergeSettings("core_ties", 0.7),
    "core_prune": MergeSettings("core_prune", 0.4),
    "core_dare": MergeSettings("core_dare", 0.6),
}


def _factored_otherwise(name: str, seed: int) -> tuple[Adapter, Adapter]:
    """The same update twice, in two factorings that 8 bits hold alike: rows swapped, turned, scaled by powers of 2."""
    rng = np.random.default_rng(seed)
    plain, other = {}, {}
    for group in GROUPS:
        a = rng.integers(-127, 128, (group.layers, group.n_in, 4)).astype(np.float32)
        b = rng.integers(-127, 128, (group.layers, 4, group.n_out)).astype(np.float32)
        a[:, ::8], b[:, :, ::8] = 127, 127  # the step of every block of 8 is then 1
        order, scale = rng.permutation(4), rng.choice([-4.0, -2.0, 2.0, 8.0], 4).astype(np.float32)
        plain[group.name] = (a, b)
        other[group.name] = (a[:, :, order] * scale, b[:, order] / scale[:, None])
    return adapter_of(name, plain), adapter_of(f"{name} otherwise", other)


def _relative(one: dict[str, Float], other: dict[str, Float]) -> float:
    return max(float(np.linalg.norm(one[n] - other[n]) / np.linalg.norm(other[n])) for n in other)


@pytest.mark.parametrize("method", EXACT)
def test_one_adapter_at_weight_1_is_that_adapter_under_every_exact_method(merger: Merger, method: str) -> None:
    adapter = make_adapter("one", rank=4)
    for name, delta in _deltas(merger.merge([adapter], [1.0], EXACT[method])).items():
        _assert_close(delta, oracle.delta([(adapter.modules[name], 1.0)]), 1e-5)


@pytest.mark.parametrize("method", EXACT)
def test_the_order_does_not_matter_to_exact_methods_of_mixed_ranks(merger: Merger, method: str) -> None:
    adapters = [make_adapter("small", rank=2, bits=4), make_adapter("large", rank=6), make_adapter("middle", rank=3)]
    wanted = _deltas(merger.merge(adapters, WEIGHTS[:3], EXACT[method]))
    for order in itertools.permutations(range(3)):
        merged = merger.merge([adapters[i] for i in order], [WEIGHTS[i] for i in order], EXACT[method])
        assert _relative(_deltas(merged), wanted) < 1e-3


@pytest.mark.parametrize("method", [name for name in EXACT if name != "core_dare"])
@pytest.mark.parametrize("seed", range(3))
def test_exact_methods_do_not_see_how_an_update_was_factored(merger: Merger, method: str, seed: int) -> None:
    pairs = [_factored_otherwise(f"adapter{i}", 10 * seed + i) for i in range(3)]
    one, other = (_deltas(merger.merge([pair[i] for pair in pairs], WEIGHTS[:3], EXACT[method])) for i in (0, 1))
    # float32 Gram matrices leave noise in a core; an entry at the threshold or of no clear sign may then go either way
    assert _relative(one, other) < (3e-2 if "core" in method else 1e-3)


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
def test_the_paper_family_does_see_it(merger: Merger, method: str) -> None:
    pairs = [_factored_otherwise(f"adapter{i}", i) for i in range(3)]
    one, other = (
        _deltas(merger.merge([pair[i] for pair in pairs], WEIGHTS[:3], MergeSettings(method))) for i in (0, 1)
    )
    assert _relative(one, other) > 0.1


@pytest.mark.parametrize(
    ("method", "same"),
    [("core_prune", "product"), ("core_dare", "product"), ("magnitude_prune", "linear"), ("dare_linear", "linear")],
)
def test_density_1_gives_what_the_method_gives_unpruned(merger: Merger, method: str, same: str) -> None:
    adapters = _adapters(BITS["mixed"][:3])
    found = _deltas(merger.merge(adapters, WEIGHTS[:3], MergeSettings(method, 1.0)))
    assert _relative(found, _deltas(merger.merge(adapters, WEIGHTS[:3], MergeSettings(same)))) < 1e-5


@pytest.mark.parametrize("method", ["core_dare", "dare_linear", "dare_ties"])
def test_what_dare_drops_follows_the_seed(merger: Merger, method: str) -> None:
    adapters = _adapters(BITS["mixed"][:2])
    runs = [_deltas(merger.merge(adapters, [0.5, 0.5], MergeSettings(method, dare_seed=seed))) for seed in (1, 1, 2)]
    assert _relative(runs[0], runs[1]) == 0
    assert _relative(runs[0], runs[2]) > 0.05


def test_svd_is_the_best_approximation_and_says_what_it_cut(merger: Merger) -> None:
    adapters = _adapters(BITS["int8"][:3])
    merged = merger.merge(adapters, WEIGHTS[:3], MergeSettings("svd", rank=5))
    total = cut = 0.0
    for name, delta in _deltas(merged).items():
        whole = oracle.delta([(a.modules[name], w) for a, w in zip(adapters, WEIGHTS, strict=False)])
        u, s, vt = np.linalg.svd(whole, full_matrices=False)
        _assert_close(delta, (u[:, :, :5] * s[:, None, :5]) @ vt[:, :5], 1e-4)
        total, cut = total + float((s**2).sum()), cut + float((s[:, 5:] ** 2).sum())
        assert merged.modules[name].rank == 5
    assert merged.report.discarded_energy == pytest.approx(cut / total, abs=1e-5)


def test_svd_reaches_its_energy(merger: Merger) -> None:
    merged = merger.merge(_adapters(BITS["int8"][:3]), WEIGHTS[:3], MergeSettings("svd", energy=0.8))
    assert merged.report.discarded_energy <= 0.2
    assert max(module.rank for module in merged.modules.values()) < 12


@pytest.mark.parametrize("method", ["product", "linear", "svd", "core_ties", "dare_ties"])
def test_the_norm_guard_gives_the_mean_norm_of_the_parts(merger: Merger, method: str) -> None:
    adapters, weights = _adapters(BITS["int8"][:3]), WEIGHTS[:3]
    plain = merger.merge(adapters, weights, MergeSettings(method))
    guarded = merger.merge(adapters, weights, MergeSettings(method, norm_guard=True))
    parts = [math.sqrt(sum(float((oracle.delta([(m, 1.0)]) ** 2).sum()) for m in a.modules.values())) for a in adapters]
    wanted = sum(abs(w) * norm for w, norm in zip(weights, parts, strict=True))
    assert merger.norm(guarded) == pytest.approx(wanted, rel=1e-3)
    assert guarded.report.norm_factor == pytest.approx(wanted / merger.norm(plain), rel=1e-3)
    assert merger.norm(plain) == pytest.approx(
        math.sqrt(sum(float((d.astype(np.float64) ** 2).sum()) for d in _deltas(plain).values())), rel=1e-4
    )


def test_the_norm_guard_does_not_blow_up_what_cancels(merger: Merger) -> None:
    adapters = [make_adapter("one"), Adapter("twin", make_adapter("one").modules, 8, "b", "another digest")]
    merged = merger.merge(adapters, [0.6, -0.6], MergeSettings(norm_guard=True))
    assert merged.report.norm_factor == 1
    assert all(np.abs(delta).max() < 1e-4 for delta in _deltas(merged).values())


def test_inner_products_are_those_of_the_updates(merger: Merger) -> None:
    adapters = [*_adapters(BITS["mixed"][:2]), make_adapter("partial", groups=GROUPS[:1], rank=2)]
    wanted = np.zeros((3, 3))
    for module in adapters[0].modules:
        members = [i for i, a in enumerate(adapters) if module in a.modules]
        flat = np.stack([oracle.delta([(adapters[i].modules[module], 1.0)]).ravel() for i in members])
        wanted[np.ix_(members, members)] += flat @ flat.T
    np.testing.assert_allclose(merger.inner_products(adapters), wanted, rtol=1e-4, atol=1e-4 * wanted.max())


@pytest.mark.parametrize("method", METHODS)
def test_eight_threads_merge_as_one_does(merger: Merger, method: str) -> None:
    adapters = _adapters(BITS["mixed"])

    def run(weight: float) -> dict[str, tuple[Float, Float]]:
        return _arrays(merger.merge(adapters, [weight, 0.3, 0.2, 0.1], MergeSettings(method)))

    weights = [0.1 * i for i in range(1, 17)]
    alone = [run(weight) for weight in weights]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(run, weights))
    for one, other in zip(alone, together, strict=True):
        for name, factors in one.items():
            for found, wanted in zip(other[name], factors, strict=True):
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("method", ["svd", "core_ties", "core_prune", "core_dare"])
def test_what_is_kept_of_a_set_gives_what_a_fresh_merger_gives(merger: Merger, method: str) -> None:
    adapters, settings = _adapters(BITS["mixed"][:3]), MergeSettings(method, 0.4)
    merger.merge(adapters, WEIGHTS[:3], settings)
    again = _deltas(merger.merge(adapters, WEIGHTS[1:], settings))
    fresh = _deltas(Merger(choose_device("cpu")).merge(adapters, WEIGHTS[1:], settings))
    for name, delta in fresh.items():
        np.testing.assert_array_equal(again[name], delta)
