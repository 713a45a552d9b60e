"""Prompts that another process has read: the answer is the same to the token, and begins earlier."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Composer, Request, open_bundle
from edgecompose.bundle.files import Bundle
from edgecompose.bundle.specs import KVCacheType
from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.engine.device import Device
from edgecompose.errors import GenerationError
from tests.fixtures_tiny import TASKS

pytestmark = pytest.mark.slow

PROMPT = " ".join(TASKS["animals"] * 3)
REQUEST = Request(raw=True, max_tokens=8, weights={"animals": 1.0}, prompt_cache=True)


def opened(bundle: Path, kv_cache: KVCacheType = "float32") -> Composer:
    return open_bundle(bundle, device="cpu", kv_cache=kv_cache)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each sequence reads as a prompt's."""
    counts: list[int] = []
    original = DecoderState.passes

    def counting(state: DecoderState, ids: Any, **options: Any) -> Any:
        counts.append(len(ids))
        return original(state, ids, **options)

    monkeypatch.setattr(DecoderState, "passes", counting)
    return counts


@pytest.mark.parametrize("kv_cache", ["float32", "int8"])
def test_the_answer_of_another_process_is_the_same_and_reads_nothing_again(
    bundle: Path, tmp_path: Path, passes: list[int], kv_cache: KVCacheType
) -> None:
    longer = PROMPT + " and so on, " * 30
    with opened(bundle, kv_cache) as composer:
        expected = [composer.run(text, REQUEST).text for text in (PROMPT, longer)]
    with opened(bundle, kv_cache) as composer:
        composer.run(PROMPT, REQUEST)
        assert composer.save_prompts(tmp_path / "p") == 1
    passes.clear()
    with opened(bundle, kv_cache) as composer:
        assert composer.load_prompts(tmp_path / "p") == 1
        assert [composer.run(text, REQUEST).text for text in (PROMPT, longer)] == expected
        tokens = len(composer.model.tokenizer.encode_prompt(longer, special_tokens=True))
        assert passes == [tokens - 128]  # a whole pass of the longer one, all of the same one
        assert composer.run(PROMPT, dataclasses.replace(REQUEST, weights={"numbers": 1.0})).text
        assert len(passes) == 2  # under another blend it is read


def test_what_was_used_longest_ago_leaves_first(bundle: Path, tmp_path: Path) -> None:
    texts = [" ".join(task) for task in TASKS.values()]
    with opened(bundle) as composer:
        for text in texts:
            composer.run(text, REQUEST)
        sizes = [saved.bytes for saved in composer.model._prompts.save(1 << 30)]
        assert composer.save_prompts(tmp_path / "p", limit=sum(sizes)) == 3
        assert composer.save_prompts(tmp_path / "q", limit=sizes[0] + sizes[1]) == 2
        assert (tmp_path / "q").stat().st_size <= sizes[0] + sizes[1] + 1024
    with opened(bundle) as composer:
        composer.load_prompts(tmp_path / "p")
        before = [list(saved.tokens) for saved in composer.model._prompts.save(sum(sizes))]
        composer.run(texts[0], REQUEST)  # the first is the last used now, and there once
        after = [list(saved.tokens) for saved in composer.model._prompts.save(sum(sizes))]
        assert after == [before[2], before[0], before[1]]


def test_prompts_of_another_cache_are_passed_over_and_other_devices_are_refused(bundle: Path, tmp_path: Path) -> None:
    with opened(bundle) as composer:
        composer.run(PROMPT, REQUEST)
        composer.save_prompts(tmp_path / "p")
    with opened(bundle, "int8") as composer:
        assert composer.load_prompts(tmp_path / "p") is None
        assert composer.model._prompts.save(1 << 30) == []
    cuda = Composer(Bundle(bundle), Device("cuda", ("CUDAExecutionProvider",), "for a test"))
    for call in (cuda.save_prompts, cuda.load_prompts):
        with pytest.raises(GenerationError, match="a prompt cache is saved on a CPU only, and the device is cuda"):
            call(tmp_path / "p")


def test_keys_and_values_survive_a_copy(bundle: Path) -> None:
    with opened(bundle) as composer:
        blend = composer.blends.blend({}, composer.default_merge)
        one, other = (composer.model.decoder.start(blend, 60) for _ in range(2))
        ids = list(range(5, 45))
        expected = one.forward(ids).copy()
        cache = one.save(30)
        assert cache is not None
        other.restore(ids[:30], cache)
        np.testing.assert_array_equal(other.save(30), cache)
        assert other.tokens == ids[:30]
        assert int(other.forward(ids[30:])[0].argmax()) == int(expected[0].argmax())
        assert one.save(41) is None
