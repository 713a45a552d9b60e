"""Which earlier sequence a prompt continues."""

from __future__ import annotations

from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from edgecompose.engine.decoder_state import DecoderState
from edgecompose.generation.prompt_cache import PromptCache, common_prefix

LONG = list(range(40))


class Sequence:
    """What a prefix cache sees of a sequence."""

    def __init__(self, composition: str, tokens: list[int]) -> None:
        self.composition, self.tokens = composition, list(tokens)

    def rewind(self, length: int) -> None:
        del self.tokens[length:]


def stored(cache: PromptCache, composition: str, tokens: list[int]) -> DecoderState:
    made = cast(DecoderState, Sequence(composition, tokens))
    cache.put(made)
    return made


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_a_common_prefix_is_common_and_the_longest(one: list[int], other: list[int]) -> None:
    count = common_prefix(one, other)
    assert one[:count] == other[:count]
    assert count == min(len(one), len(other)) or one[count] != other[count]


def test_the_longest_prefix_under_the_same_blend_is_taken_once() -> None:
    cache = PromptCache()
    short, long, foreign = stored(cache, "a", LONG[:20]), stored(cache, "a", LONG[:30]), stored(cache, "b", LONG)
    assert cache.take("a", LONG) is long and long.tokens == LONG[:30]
    assert cache.take("a", [*LONG[:18], 99]) is short and short.tokens == LONG[:18]
    assert cache.take("a", LONG) is None
    assert cache.take("b", LONG) is foreign


def test_the_last_token_is_left_to_be_read() -> None:
    cache = PromptCache()
    whole = stored(cache, "a", LONG)
    assert cache.take("a", LONG[:25]) is whole and whole.tokens == LONG[:24]


def test_few_tokens_in_common_are_not_worth_a_sequence() -> None:
    cache = PromptCache()
    stored(cache, "a", LONG)
    assert cache.take("a", [*LONG[:5], *range(100, 150)]) is None
    assert cache.take("a", LONG) is not None


def test_the_oldest_are_forgotten() -> None:
    cache = PromptCache(2)
    for first in range(3):
        stored(cache, "a", [first, *LONG])
    assert cache.take("a", [0, *LONG]) is None
    assert cache.take("a", [1, *LONG]) is not None
    cache.clear()
    assert cache.take("a", [2, *LONG]) is None
