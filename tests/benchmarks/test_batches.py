"""The benchmark of several answers at once: equal lengths, blends that differ, rates without prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.generation import cache_memory
from benchmarks.generation.batches import measure_kind, write_batch
from benchmarks.generation.cache_memory import WRITTEN, cache_in_this_process, long_prompts
from benchmarks.measuring.bundles import without_end_tokens
from benchmarks.measuring.requests import KINDS, greedy_requests, numbered_prompts, weights_of
from edgecompose import open_bundle
from edgecompose.bundle.files import read_manifest
from tests.factories import write_bundle

ADAPTERS = ["a", "b", "c", "d"]


@given(st.integers(0, 200), st.integers(0, 200))
def test_no_two_sequences_have_the_same_blend(first: int, second: int) -> None:
    assert (weights_of(ADAPTERS, first) == weights_of(ADAPTERS, second)) == (first == second)
    assert len(weights_of(ADAPTERS, first)) == 3
    assert all(0 < weight < 1 for weight in weights_of(ADAPTERS, first).values())


@pytest.mark.parametrize(("kind", "blends"), [("different_blends", 5), ("equal_blends", 1), ("base_alone", 1)])
def test_the_requests_of_each_kind(kind: str, blends: int) -> None:
    (known,) = (name for name in KINDS if name == kind)
    requests = greedy_requests(ADAPTERS, known, 5, tokens=7)
    assert len({tuple((request.weights or {}).items()) for request in requests}) == blends
    assert all(bool(request.weights) == (kind != "base_alone") for request in requests)
    assert all((request.max_tokens, request.sampling) == (7, None) for request in requests)


def test_prompts_differ() -> None:
    assert len(set(numbered_prompts(40))) == 40


def test_a_copy_without_end_tokens_leaves_the_bundle_as_it_is(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "bundle")
    copy = without_end_tokens(tmp_path / "bundle", tmp_path / "copy")
    assert manifest.base.end_tokens
    assert read_manifest(tmp_path / "bundle") == manifest
    assert read_manifest(copy).base.end_tokens == ()
    assert read_manifest(copy).files == manifest.files
    assert all((copy / name).read_bytes() == (tmp_path / "bundle" / name).read_bytes() for name in manifest.files)


@pytest.mark.slow
def test_all_answers_have_the_same_length_and_are_those_alone(bundle: Path, tmp_path: Path) -> None:
    with open_bundle(without_end_tokens(bundle, tmp_path / "copy"), device="cpu") as composer:
        batch = write_batch(composer, "different_blends", 3, tokens=12)
        assert [answer.generated_tokens for answer in batch.answers] == [12] * 3
        assert len({answer.composition for answer in batch.answers}) == 3
        rows = measure_kind(composer, "different_blends", sizes=(1, 3), tokens=12, rounds=1)
    assert rows["equal_to_alone"] == {1: 1, 3: 3}
    assert rows["tokens"] == {1: 12, 3: 36}
    assert rows["decode_ratio"][1] == rows["whole_ratio"][1] == 1
    assert rows["decode_tokens_per_s"][3] > 0


@pytest.mark.slow
def test_memory_is_that_of_sequences_of_the_whole_length(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def growth(run: Callable[[], object]) -> int:
        run()
        return 5_000_000  # that of a tiny base is less than a page

    monkeypatch.setattr(cache_memory, "peak_growth", growth)
    copy = without_end_tokens(bundle, tmp_path / "copy")
    row = cache_in_this_process(copy, "float32", sequences=2, length=96)
    assert all(96 - 4 <= tokens <= 96 + 4 for tokens in row["tokens"])  # a cut text may be tokenised a little otherwise
    spec = read_manifest(copy).base
    assert row["float32_cache_mb"] == 2 * 4 * spec.layers * spec.kv_heads * spec.head_size * 2 * 96 / 1e6
    assert row["beyond_model_mb"] == 5
    assert row["tokens_per_s"] > 0
    assert len(row["texts"]) == 2
    with open_bundle(copy, device="cpu") as composer:
        assert len(set(long_prompts(composer, 3, 96 - WRITTEN))) == 3
