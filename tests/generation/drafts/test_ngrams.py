"""Looking up how n-grams were continued, against a search through everything."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.generation.drafts.ngrams import Match, NgramIndex

SHORTEST, LONGEST = 2, 4
tokens = st.lists(st.integers(0, 3), max_size=40)


def brute_force(text: Sequence[int], sequences: Sequence[Sequence[int]], *, latest: bool) -> tuple[int, list[int]]:
    """Length of the longest n-gram that the text ends with and that is continued, and all that follows it there."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        suffix = list(text[len(text) - length :])
        places = [
            list(sequence[end:])
            for sequence in sequences
            for end in range(length, len(sequence))
            if list(sequence[end - length : end]) == suffix and len(text) >= length
        ]
        if places:
            return length, places[-1 if latest else 0]
    return 0, []


@given(tokens, st.lists(st.integers(1, 7), max_size=5))
def test_a_text_is_continued_as_after_the_latest_place_of_its_longest_end(text: list[int], parts: list[int]) -> None:
    index = NgramIndex(SHORTEST, LONGEST, latest=True)
    start = 0
    for part in [*parts, len(text)]:  # in whatever parts it is added
        index.extend(text[start : start + part])
        start += part
    length, rest = brute_force(text, [text], latest=True)
    match = index.find(text[-LONGEST:])
    assert (0 if match is None else match.length) == length
    if match is not None:
        guess = index.read(match, len(rest) + 9)
        assert guess[: len(rest)] == rest
        whole = [*text, *guess]  # what is behind the end goes on as its own copy
        period = len(text) - match.continuation
        assert all(whole[i] == whole[i - period] for i in range(len(text), len(whole)))


@given(st.lists(tokens, max_size=5), tokens)
def test_a_text_is_continued_as_in_the_first_sequence_that_has_its_end(
    sequences: list[list[int]], text: list[int]
) -> None:
    index = NgramIndex(SHORTEST, LONGEST, latest=False)
    for sequence in sequences:
        index.extend(sequence)
        index.begin()
    length, rest = brute_force(text, sequences, latest=False)
    match = index.find(text[-LONGEST:])
    assert (0 if match is None else match.length) == length
    if match is not None:
        assert index.read(match, 50) == rest


@given(st.lists(tokens, min_size=1, max_size=4), tokens)
def test_what_agrees_before_a_match_is_counted(sequences: list[list[int]], text: list[int]) -> None:
    index = NgramIndex(SHORTEST, LONGEST, latest=False)
    flat: list[int] = []
    for sequence in sequences:
        index.extend(sequence)
        index.begin()
        flat += [*sequence, -1]
    match = index.find(text[-LONGEST:])
    if match is not None:
        before = flat[: match.continuation]
        agreeing = next((n for n in range(len(text)) if n >= len(before) or before[-1 - n] != text[-1 - n]), len(text))
        assert index.agreement(match, text) == agreeing >= match.length


def test_a_guess_ends_before_an_end_token_and_at_its_sequence() -> None:
    index = NgramIndex(SHORTEST, LONGEST, latest=False)
    index.extend([1, 2, 3, 4, 5])
    index.begin()
    index.extend([6, 7, 8])
    assert index.find([1, 2]) == Match(2, 2)
    assert index.read(Match(2, 2), 9) == [3, 4, 5]
    assert index.read(Match(2, 2), 9, end={4}) == [3]
    assert index.read(Match(2, 2), 1) == [3]
    assert index.find([5, 6]) is None
    assert index.find([2]) is None


@pytest.mark.parametrize("ids", [[0, 0, 0, 0], [2**24 - 1, 0, 2**24 - 1, 0]])
def test_ids_at_the_ends_of_their_range_are_told_apart(ids: list[int]) -> None:
    index = NgramIndex(SHORTEST, LONGEST, latest=True)
    index.extend([*ids, 7, 1])
    assert index.find(ids) == Match(4, 4)
    assert index.find([ids[-1], 7]) == Match(5, 2)
    assert index.find([0, 1]) is None
