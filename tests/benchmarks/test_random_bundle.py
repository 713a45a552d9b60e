"""Bundles with random adapters: each task's prompt is answered under a blend of three."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import attachment
from benchmarks.export.random_bundle import write_bundle
from benchmarks.measuring.prompts import TASK_PROMPTS
from edgecompose import open_bundle
from tests.fixtures_tiny import TinyZoo

pytestmark = pytest.mark.slow


def test_each_prompt_gets_three_adapters_at_the_weights_of_its_task(zoo: TinyZoo, tmp_path: Path) -> None:
    base, (embedder, _) = zoo.base("llama").folder, zoo.embedder()
    for _ in range(2):  # the second takes the place of the first
        bundle = write_bundle(base, embedder, tmp_path / "bundles" / "tiny", rank=4)
    assert [path.name for path in bundle.parent.iterdir() if not path.name.endswith(".lock")] == ["tiny"]
    with open_bundle(bundle, device="cpu") as composer:
        blends = [composer.compose(prompt) for prompt in TASK_PROMPTS]
    assert all(sorted(blend.retrieval.weights.values()) == pytest.approx([0.2, 0.3, 0.5]) for blend in blends)
    assert len({blend.merged.digest for blend in blends}) == len(TASK_PROMPTS)
    assert all(module.rank == 12 for module in blends[0].merged.modules.values())


def test_blends_of_a_pool_are_cut_and_the_base_is_that_of_bundle_or_folder(zoo: TinyZoo, bundle: Path) -> None:
    folder = zoo.base("llama").folder
    assert attachment.read_spec(bundle).identity == attachment.read_spec(folder).identity
    blends = attachment.pool_blends(bundle, [1, 3], energy=0.5)
    assert list(blends) == ["pool_1_product", "pool_1_svd", "pool_3_product", "pool_3_svd"]
    ranks = {name: attachment.ranks_of(blend) for name, blend in blends.items()}
    assert ranks["pool_3_svd"]["mean"] < ranks["pool_3_product"]["mean"]
    assert ranks["pool_3_product"]["largest"] >= 8
    assert 0 < blends["pool_3_svd"].report.discarded_energy <= 0.5
