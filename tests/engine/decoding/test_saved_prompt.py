"""The file of saved prompts: what comes back, and every file that is refused or passed over."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from edgecompose.engine.decoding.saved_prompt import FORMAT, CacheLayout, SavedPrompt, read_prompts, write_prompts
from edgecompose.errors import GenerationError

LAYOUT = CacheLayout("i" * 64, layers=2, heads=3, width=4, dtype=np.int8, vocabulary=50, pass_tokens=8)
LIMIT = 1 << 20


def prompt(length: int, *, seed: int = 0, logits: bool = True) -> SavedPrompt:
    rng = np.random.default_rng(seed)
    return SavedPrompt(
        f"blend{seed}",
        rng.integers(0, 50, length).tolist(),
        rng.integers(-128, 128, (4, 3, length, 4)).astype(np.int8),
        rng.standard_normal(50).astype(np.float32) if logits else None,
    )


def read(path: Path, layout: CacheLayout = LAYOUT) -> list[SavedPrompt] | None:
    return read_prompts(path, layout, limit=LIMIT)


@given(lengths=st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_prompts_come_back_as_they_were(tmp_path: Path, lengths: list[tuple[int, bool]]) -> None:
    prompts = [prompt(length, seed=i, logits=logits) for i, (length, logits) in enumerate(lengths)]
    write_prompts(tmp_path / "p", prompts, LAYOUT)
    result = read(tmp_path / "p")
    assert result is not None and len(result) == len(prompts)
    for ours, theirs in zip(result, prompts, strict=True):
        assert (ours.composition, list(ours.tokens)) == (theirs.composition, list(theirs.tokens))
        np.testing.assert_array_equal(ours.cache, theirs.cache)
        assert (ours.logits is None) == (theirs.logits is None)
        if ours.logits is not None and theirs.logits is not None:
            np.testing.assert_array_equal(ours.logits, theirs.logits)
    assert (tmp_path / "p").stat().st_size <= sum(p.bytes for p in prompts) + 1024


def test_a_file_of_something_else_that_computes_is_passed_over(tmp_path: Path) -> None:
    write_prompts(tmp_path / "p", [prompt(5)], LAYOUT)
    assert read(tmp_path / "p", replace(LAYOUT, identity="j" * 64)) is None
    content = (tmp_path / "p").read_bytes().replace(FORMAT.encode(), b"edgecompose-prompts/9")
    (tmp_path / "p").write_bytes(content)
    assert read(tmp_path / "p") is None


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_never_gives_other_prompts(tmp_path: Path, place: int, bit: int) -> None:
    write_prompts(tmp_path / "p", [prompt(9), prompt(4, seed=1)], LAYOUT)
    content = bytearray((tmp_path / "p").read_bytes())
    content[place % len(content)] ^= 1 << bit
    (tmp_path / "p").write_bytes(content)
    try:
        result = read(tmp_path / "p")
    except GenerationError as error:
        assert str(tmp_path / "p") in str(error) and "remove it" in str(error)
        return
    for ours, theirs in zip(result or [], [prompt(9), prompt(4, seed=1)], strict=False):
        # a flipped bit of a blend's name leaves a prompt that no blend takes
        assert list(ours.tokens) == list(theirs.tokens)
        np.testing.assert_array_equal(ours.cache, theirs.cache)
        np.testing.assert_array_equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 40, 300, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    write_prompts(tmp_path / "p", [prompt(9)], LAYOUT)
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:cut])
    with pytest.raises(GenerationError, match="is damaged, or no such file.*remove it, or give another"):
        read(tmp_path / "p")


@pytest.mark.parametrize(
    "change",
    [
        {"0.cache": np.zeros((4, 3, 9, 4), np.uint8)},
        {"0.cache": np.zeros((4, 3, 8, 4), np.int8)},
        {"0.cache": np.zeros((0, 3, 9, 4), np.int8)},
        {"0.tokens": np.full(9, 50, np.int32)},
        {"0.tokens": np.full(9, -1, np.int32)},
        {"0.tokens": np.zeros((9, 1), np.int32)},
        {"0.tokens": np.zeros(0, np.int32)},
        {"0.logits": np.zeros(49, np.float32)},
        {"0.logits": np.zeros(50, np.float64)},
        {"7.tokens": np.zeros(2, np.int32)},
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_prompts(tmp_path / "p", [prompt(9)], LAYOUT)
    entries = json.dumps([{"composition": "blend0", "checksum": 0}])
    metadata = {"format": FORMAT, "identity": LAYOUT.identity, "prompts": entries}
    (tmp_path / "p").write_bytes(save({**load((tmp_path / "p").read_bytes()), **change}, metadata))
    with pytest.raises(GenerationError, match="is damaged"):
        read(tmp_path / "p")


@pytest.mark.parametrize("table", ["", "{}", "[3]", '[{"composition": 1, "checksum": 2}]', "[" * 100_000, "null"])
def test_a_table_that_is_none_is_refused(tmp_path: Path, table: str) -> None:
    metadata = {"format": FORMAT, "identity": LAYOUT.identity, "prompts": table}
    (tmp_path / "p").write_bytes(save({}, metadata))
    with pytest.raises(GenerationError, match="is damaged"):
        read(tmp_path / "p")


def test_files_that_are_large_or_no_files_or_of_others_are_refused(tmp_path: Path) -> None:
    write_prompts(tmp_path / "p", [prompt(9)], LAYOUT)
    with pytest.raises(GenerationError, match="is larger than 100 bytes; remove it, or raise --prompt-cache-bytes"):
        read_prompts(tmp_path / "p", LAYOUT, limit=100)
    with pytest.raises(GenerationError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "q").write_bytes(save({"a": np.zeros(3)}, {"format": "edgecompose-adapter/3"}))
    with pytest.raises(GenerationError, match="another format"):
        read(tmp_path / "q")
