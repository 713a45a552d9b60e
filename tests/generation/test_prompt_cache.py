"""Which earlier prompt a new one continues, and how much of it is the same computation."""

from __future__ import annotations

from typing import cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.generation.prompt_cache import CachedPrompt, PromptCache, common_prefix

LONG = list(range(40))
PASS = 8
ANSWER = [900, 901]


class Sequence:
    """What a prompt cache sees of a sequence."""

    pass_tokens = PASS

    def __init__(self, composition: str, tokens: list[int]) -> None:
        self.composition, self.tokens = composition, list(tokens)

    def rewind(self, length: int) -> None:
        del self.tokens[length:]

    def forward(self, ids: list[int]) -> None:
        assert len(self.tokens) % PASS == 0 and len(ids) == PASS
        self.tokens += ids


def fresh() -> DecoderState:
    raise AssertionError("nothing was saved")


def cached(composition: str, tokens: list[int]) -> CachedPrompt:
    """A prompt that was answered."""
    state = cast(DecoderState, Sequence(composition, tokens + ANSWER))
    return CachedPrompt(state, len(tokens), tokens + ANSWER, np.array([len(tokens)], np.float32))


def stored(cache: PromptCache, composition: str, tokens: list[int]) -> DecoderState:
    prompt = cached(composition, tokens)
    cache.put(prompt)
    return prompt.state


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_a_common_prefix_is_common_and_the_longest(one: list[int], other: list[int]) -> None:
    count = common_prefix(one, other)
    assert one[:count] == other[:count]
    assert count == min(len(one), len(other)) or one[count] != other[count]


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_whole_passes_of_the_prompt_are_reused_or_all_of_it(prompt: list[int], ids: list[int]) -> None:
    count = cached("a", prompt).reusable(ids)
    assert ids[:count] == prompt[:count] and count <= len(prompt)
    if ids == prompt:
        assert count == len(prompt)
    else:
        assert count % PASS == 0 and count < len(ids)
        assert count + PASS > min(common_prefix(prompt, ids), len(ids) - 1)


def test_the_longest_prefix_under_the_same_blend_is_taken_once() -> None:
    cache = PromptCache()
    short, long, foreign = stored(cache, "a", LONG[:20]), stored(cache, "a", LONG[:30]), stored(cache, "b", LONG)
    assert cache.take("a", LONG, fresh) == (long, None) and long.tokens == LONG[:24]
    assert cache.take("a", [*LONG[:18], 99], fresh) == (short, None) and short.tokens == LONG[:16]
    assert cache.take("a", LONG, fresh) is None
    taken = cache.take("b", LONG, fresh)
    assert taken is not None and taken[0] is foreign


def test_the_same_prompt_again_is_not_read_again() -> None:
    cache = PromptCache()
    whole = stored(cache, "a", LONG[:21])
    taken = cache.take("a", LONG[:21], fresh)
    assert taken is not None and taken[0] is whole and whole.tokens == LONG[:21]
    assert taken[1] is not None and taken[1].tolist() == [21]


def test_the_tokens_of_an_answer_are_read_again() -> None:
    cache = PromptCache()
    state = stored(cache, "a", LONG[:PASS])
    assert cache.take("a", [*LONG[:PASS], *ANSWER, 5, 6, 7, 8, 9, 10, 11], fresh) == (state, None)
    assert state.tokens == LONG[:PASS]


@given(st.integers(1, 40))
def test_what_an_answer_wrote_is_read_again_a_pass_at_a_time(length: int) -> None:
    cache = PromptCache()
    prompt = CachedPrompt(cast(DecoderState, Sequence("a", LONG)), length, LONG, np.zeros(1, np.float32))
    cache.put(prompt)
    for done in range(length // PASS, len(LONG) // PASS):
        assert cached_count(cache) == done
        taken = cache.take_behind()
        assert taken is not None and cache.take("a", LONG, fresh) is None
        cache.put(taken.read_pass())
    assert cache.take_behind() is None
    assert cache.take("a", [*LONG, 99], fresh) == (prompt.state, None)
    assert prompt.state.tokens == LONG


def cached_count(cache: PromptCache) -> int:
    """Whole passes of LONG that the only prompt of a cache has read."""
    (prompt,) = cache._prompts
    return prompt.reusable([*LONG, 99]) // PASS


def test_the_oldest_are_forgotten() -> None:
    cache = PromptCache(2)
    for first in range(3):
        stored(cache, "a", [first, *LONG])
    assert cache.take("a", [0, *LONG], fresh) is None
    assert cache.take("a", [1, *LONG], fresh) is not None
    cache.clear()
    assert cache.take("a", [2, *LONG], fresh) is None
