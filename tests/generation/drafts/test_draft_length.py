"""How many tokens are drafted: none where guesses are wrong, all where they are right, and never at a loss."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.engine.decoding.pass_costs import PassCosts
from edgecompose.generation.drafts.draft_length import DraftLength, Source

SOURCES: tuple[Source, ...] = ("text", "examples")


def write(length: DraftLength, share: float, passes: int, seed: int = 0) -> tuple[int, int, list[int]]:
    """Passes over a stream whose guesses are right with a probability: tokens, tokens drafted, and each length."""
    random_numbers, tokens, lengths = random.Random(seed), 0, []
    for _ in range(passes):
        count = length.choose("text", 4, 8)
        lengths.append(count)
        tokens += 1
        for position in range(min(count + 1, 8)):  # the guess behind what is drafted is graded too
            right = random_numbers.random() < share
            length.observe("text", 4, right=right)
            if not right:
                break
            tokens += position < count
    return tokens, sum(lengths), lengths


def test_a_stream_that_never_accepts_is_hardly_drafted_for() -> None:
    tokens, drafted, lengths = write(DraftLength(PassCosts()), 0.0, 1000)
    assert tokens == 1000
    assert drafted <= 20
    assert lengths[20:] == [0] * 980


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("agreement", [2, 3, 4, 8])
def test_a_copy_is_drafted_as_far_as_it_may(source: Source, agreement: int) -> None:
    length = DraftLength(PassCosts())
    for _ in range(40):
        length.observe(source, agreement, right=True)
    assert length.choose(source, agreement, 8) == 8
    assert length.choose(source, agreement, 3) == 3
    assert length.choose(source, agreement, 0) == 0


def test_text_that_begins_to_repeat_itself_is_noticed_without_a_draft() -> None:
    length = DraftLength(PassCosts())
    write(length, 0.0, 500)
    assert length.choose("text", 4, 8) == 0
    _, _, lengths = write(length, 1.0, 40)
    assert lengths[0] == 0 and lengths[-1] == 8


def test_kinds_of_guesses_are_told_apart() -> None:
    length = DraftLength(PassCosts())
    for _ in range(30):
        length.observe("text", 2, right=False)
        length.observe("examples", 2, right=True)
    assert length.choose("text", 2, 8) == 0 < length.choose("examples", 2, 8)
    assert length.choose("text", 8, 8) > 0


def test_two_tokens_that_agree_are_not_enough_before_such_a_guess_was_right() -> None:
    length = DraftLength(PassCosts())
    assert length.choose("text", 2, 8) == 0
    assert length.choose("text", 8, 8) > 2
    length.observe("text", 2, right=True)
    assert length.choose("text", 2, 8) > 0


def test_a_pass_with_others_is_made_longer_only_where_that_pays_for_all() -> None:
    length = DraftLength(PassCosts())
    for _ in range(60):
        length.observe("text", 8, right=True)
    counts = [length.choose("text", 8, 8, beside=beside) for beside in (0, 1, 3, 7, 31)]
    assert counts[0] == 8 and counts[-2:] == [0, 0]
    assert counts == sorted(counts, reverse=True)


@given(st.floats(0, 1), st.lists(st.floats(0.5, 4), min_size=9, max_size=9), st.integers(0, 8))
def test_the_length_is_the_fastest_by_the_estimate(share: float, costs: list[float], most: int) -> None:
    length = DraftLength(lambda tokens: costs[tokens - 1])
    generator = random.Random(1)
    for _ in range(50):
        length.observe("text", 5, right=generator.random() < share)
    right = length.acceptance("text", 5)
    assert 0 <= right <= 1
    rates = [sum(right**i for i in range(n + 1)) / costs[n] for n in range(most + 1)]
    chosen = length.choose("text", 5, most)
    if max(rates) <= 1.0299 * rates[0]:
        assert chosen == 0
    elif max(rates) > 1.0301 * rates[0]:
        assert rates[chosen] == pytest.approx(max(rates))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_free_text_never_becomes_more_than_three_hundredths_slower(share: float) -> None:
    """Where every pass has a guess of four tokens that agree, which free text has seldom."""
    costs = PassCosts()
    for seed in range(20):
        tokens, _, lengths = write(DraftLength(costs), share, 400, seed)
        assert tokens / sum(costs(1 + count) for count in lengths) >= 0.97
