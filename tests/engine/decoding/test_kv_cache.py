"""The KV cache of a sequence."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")


from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import Device, choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import GenerationError, PromptTooLong
from tests.export.decoders import NO_ADAPTER
from tests.fixtures_tiny import TinyZoo

pytestmark = pytest.mark.slow


def test_a_sequence_takes_the_cache_of_one_before_it_under_the_same_blend(zoo: TinyZoo) -> None:
    exported = zoo.base("llama", "fp32")
    decoder = Decoder(exported.folder / exported.spec.graph, exported.spec, choose_device("cpu"))
    alone, other = MergedAdapter({}, "alone"), MergedAdapter({}, "other")
    first = decoder.start(alone, 20)
    logits = [first.forward([5, 6, 7]).copy(), first.forward([8]).copy()]
    single = first.hold()
    second = decoder.start(alone, 20)
    assert second.hold() is not single  # the first is taken
    del first
    gc.collect()
    assert decoder.start(other, 20).hold() is not single
    again = decoder.start(alone, 30)
    assert again.hold() is single
    np.testing.assert_array_equal(again.forward([5, 6, 7]), logits[0])
    np.testing.assert_array_equal(again.forward([8]), logits[1])
    with pytest.raises(GenerationError, match="of 30 tokens"):
        again.forward([1] * 27)


def test_a_cache_that_grows_holds_what_one_made_large_holds(zoo: TinyZoo) -> None:
    exported = zoo.base("llama", "fp32")
    decoder = Decoder(exported.folder / exported.spec.graph, exported.spec, choose_device("cpu"))
    wide = decoder.start(NO_ADAPTER, 200)
    narrow = decoder.start(NO_ADAPTER, 200, reserve=5)
    assert narrow.hold().cache.capacity < 70 and wide.hold().cache.capacity >= 200
    steps = [[5, 6, 7], *([token] for token in range(60)), [9] * 40, *([token] for token in range(40))]
    for ids in steps:
        np.testing.assert_array_equal(narrow.forward(ids), wide.forward(ids))
    assert narrow.tokens == wide.tokens and narrow.hold().cache.capacity >= narrow.length == 143
    with pytest.raises(GenerationError, match="of 200 tokens"):
        narrow.forward([1] * 58)
    narrow.extend(210)
    narrow.forward([1] * 58)
    with pytest.raises(PromptTooLong, match="has a context of"):
        narrow.extend(exported.spec.context + 1)


def test_a_cache_that_finds_no_memory_is_one_error_and_holds_what_it_held(
    zoo: TinyZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = zoo.base("llama", "fp32")
    decoder = Decoder(exported.folder / exported.spec.graph, exported.spec, choose_device("cpu"))
    narrow, wide = (decoder.start(MergedAdapter({}, name), 200, reserve=5) for name in ("narrow", "wide"))
    steps = [[token] for token in range(60)]
    for ids in steps:
        np.testing.assert_array_equal(narrow.forward(ids), wide.forward(ids))
    empty, calls = Device.empty, itertools.count()

    def fail_later(*arguments: Any) -> Any:
        if next(calls) >= 2:
            raise MemoryError
        return empty(*arguments)

    with monkeypatch.context() as context:
        context.setattr(Device, "empty", fail_later)
        with pytest.raises(GenerationError, match="no room for the caches of 128 tokens: memory ran out; shorten"):
            narrow.forward([9] * 40)
    for ids in ([7], [9] * 40, [3]):
        np.testing.assert_array_equal(narrow.forward(ids), wide.forward(ids))
