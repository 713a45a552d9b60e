"""Laws of the exact merge methods, and what is shared between merges."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgecompose.bundle.adapter import Adapter
from edgecompose.engine.device import choose_device
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import METHODS
from edgecompose.settings import MergeSettings
from tests import oracle
from tests.factories import GROUPS, adapter_of, make_adapter
from tests.merging.merged import BITS, WEIGHTS, Float, arrays_of, assert_close, deltas, make_adapters

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
    for name, delta in deltas(merger.merge([adapter], [1.0], EXACT[method])).items():
        assert_close(delta, oracle.delta([(adapter.modules[name], 1.0)]), 1e-5)


@pytest.mark.parametrize("method", EXACT)
def test_the_order_does_not_matter_to_exact_methods_of_mixed_ranks(merger: Merger, method: str) -> None:
    adapters = [make_adapter("small", rank=2, bits=4), make_adapter("large", rank=6), make_adapter("middle", rank=3)]
    expected = deltas(merger.merge(adapters, WEIGHTS[:3], EXACT[method]))
    for order in itertools.permutations(range(3)):
        merged = merger.merge([adapters[i] for i in order], [WEIGHTS[i] for i in order], EXACT[method])
        assert _relative(deltas(merged), expected) < 1e-3


@pytest.mark.parametrize("method", [name for name in EXACT if name != "core_dare"])
@pytest.mark.parametrize("seed", range(3))
def test_exact_methods_do_not_see_how_an_update_was_factored(merger: Merger, method: str, seed: int) -> None:
    pairs = [_factored_otherwise(f"adapter{i}", 10 * seed + i) for i in range(3)]
    one, other = (deltas(merger.merge([pair[i] for pair in pairs], WEIGHTS[:3], EXACT[method])) for i in (0, 1))
    # float32 Gram matrices leave noise in a core; an entry at the threshold or of no clear sign may then go either way
    assert _relative(one, other) < (3e-2 if "core" in method else 1e-3)


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
def test_factor_wise_methods_do_see_it(merger: Merger, method: str) -> None:
    pairs = [_factored_otherwise(f"adapter{i}", i) for i in range(3)]
    one, other = (deltas(merger.merge([pair[i] for pair in pairs], WEIGHTS[:3], MergeSettings(method))) for i in (0, 1))
    assert _relative(one, other) > 0.1


@pytest.mark.parametrize(
    ("method", "same"),
    [("core_prune", "product"), ("core_dare", "product"), ("magnitude_prune", "linear"), ("dare_linear", "linear")],
)
def test_density_1_gives_what_the_method_gives_unpruned(merger: Merger, method: str, same: str) -> None:
    adapters = make_adapters(BITS["mixed"][:3])
    result = deltas(merger.merge(adapters, WEIGHTS[:3], MergeSettings(method, 1.0)))
    assert _relative(result, deltas(merger.merge(adapters, WEIGHTS[:3], MergeSettings(same)))) < 1e-5


@pytest.mark.parametrize("method", ["core_dare", "dare_linear", "dare_ties"])
def test_what_dare_drops_follows_the_seed(merger: Merger, method: str) -> None:
    adapters = make_adapters(BITS["mixed"][:2])
    runs = [deltas(merger.merge(adapters, [0.5, 0.5], MergeSettings(method, dare_seed=seed))) for seed in (1, 1, 2)]
    assert _relative(runs[0], runs[1]) == 0
    assert _relative(runs[0], runs[2]) > 0.05


def test_svd_is_the_best_approximation_and_says_what_it_cut(merger: Merger) -> None:
    adapters = make_adapters(BITS["int8"][:3])
    merged = merger.merge(adapters, WEIGHTS[:3], MergeSettings("svd", rank=5))
    total = cut = 0.0
    for name, delta in deltas(merged).items():
        whole = oracle.delta([(a.modules[name], w) for a, w in zip(adapters, WEIGHTS, strict=False)])
        u, s, vt = np.linalg.svd(whole, full_matrices=False)
        assert_close(delta, (u[:, :, :5] * s[:, None, :5]) @ vt[:, :5], 1e-4)
        total, cut = total + float((s**2).sum()), cut + float((s[:, 5:] ** 2).sum())
        assert merged.modules[name].rank == 5
    assert merged.report.discarded_energy == pytest.approx(cut / total, abs=1e-5)


def test_svd_reaches_its_energy(merger: Merger) -> None:
    merged = merger.merge(make_adapters(BITS["int8"][:3]), WEIGHTS[:3], MergeSettings("svd", energy=0.8))
    assert merged.report.discarded_energy <= 0.2
    assert max(module.rank for module in merged.modules.values()) < 12


@pytest.mark.parametrize("method", ["product", "linear", "svd", "core_ties", "dare_ties"])
def test_the_norm_guard_gives_the_mean_norm_of_the_parts(merger: Merger, method: str) -> None:
    adapters, weights = make_adapters(BITS["int8"][:3]), WEIGHTS[:3]
    plain = merger.merge(adapters, weights, MergeSettings(method))
    guarded = merger.merge(adapters, weights, MergeSettings(method, norm_guard=True))
    parts = [math.sqrt(sum(float((oracle.delta([(m, 1.0)]) ** 2).sum()) for m in a.modules.values())) for a in adapters]
    expected = sum(abs(w) * norm for w, norm in zip(weights, parts, strict=True))
    assert merger.norm(guarded) == pytest.approx(expected, rel=1e-3)
    assert guarded.report.norm_factor == pytest.approx(expected / merger.norm(plain), rel=1e-3)
    assert merger.norm(plain) == pytest.approx(
        math.sqrt(sum(float((d.astype(np.float64) ** 2).sum()) for d in deltas(plain).values())), rel=1e-4
    )


def test_the_norm_guard_does_not_blow_up_what_cancels(merger: Merger) -> None:
    adapters = [make_adapter("one"), Adapter("twin", make_adapter("one").modules, 8, "b", "another digest")]
    merged = merger.merge(adapters, [0.6, -0.6], MergeSettings(norm_guard=True))
    assert merged.report.norm_factor == 1
    assert all(np.abs(delta).max() < 1e-4 for delta in deltas(merged).values())


def test_inner_products_are_those_of_the_updates(merger: Merger) -> None:
    adapters = [*make_adapters(BITS["mixed"][:2]), make_adapter("partial", groups=GROUPS[:1], rank=2)]
    expected = np.zeros((3, 3))
    for module in adapters[0].modules:
        members = [i for i, a in enumerate(adapters) if module in a.modules]
        flat = np.stack([oracle.delta([(adapters[i].modules[module], 1.0)]).ravel() for i in members])
        expected[np.ix_(members, members)] += flat @ flat.T
    np.testing.assert_allclose(merger.inner_products(adapters), expected, rtol=1e-4, atol=1e-4 * expected.max())


@pytest.mark.parametrize("method", METHODS)
def test_eight_threads_merge_as_one_does(merger: Merger, method: str) -> None:
    adapters = make_adapters(BITS["mixed"])

    def run(weight: float) -> dict[str, tuple[Float, Float]]:
        return arrays_of(merger.merge(adapters, [weight, 0.3, 0.2, 0.1], MergeSettings(method)))

    weights = [0.1 * i for i in range(1, 17)]
    alone = [run(weight) for weight in weights]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(run, weights))
    for one, other in zip(alone, together, strict=True):
        for name, factors in one.items():
            for result, expected in zip(other[name], factors, strict=True):
                np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("method", ["svd", "core_ties", "core_prune", "core_dare"])
def test_what_is_kept_of_a_set_gives_what_a_fresh_merger_gives(merger: Merger, method: str) -> None:
    adapters, settings = make_adapters(BITS["mixed"][:3]), MergeSettings(method, 0.4)
    merger.merge(adapters, WEIGHTS[:3], settings)
    again = deltas(merger.merge(adapters, WEIGHTS[1:], settings))
    fresh = deltas(Merger(choose_device("cpu")).merge(adapters, WEIGHTS[1:], settings))
    for name, delta in fresh.items():
        np.testing.assert_array_equal(again[name], delta)
