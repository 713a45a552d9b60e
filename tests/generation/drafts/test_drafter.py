"""Guesses of the next tokens: where they are looked up, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from edgecompose.generation.drafts.draft_length import DraftLength
from edgecompose.generation.drafts.drafter import LONGEST, SHORTEST, Drafter

FREE: Callable[[int], float] = lambda tokens: 1.0  # noqa: E731 - passes that cost the same, whatever they hold


def drafter(prompt: Sequence[int], *examples: Sequence[int], end: Sequence[int] = (), most: int = 8) -> Drafter:
    return Drafter(prompt, most=most, length=DraftLength(FREE), examples=lambda: examples, end=end)


def write(drafter: Drafter, tokens: Sequence[int]) -> Drafter:
    for token in tokens:
        drafter.append(token)
    return drafter


def test_the_text_is_looked_up_before_the_examples_and_a_longer_match_before_both() -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    assert write(drafter(prompt), [9, 2, 3, 4]).propose(8)[:2] == [5, 6]
    assert write(drafter(prompt, [2, 3, 4, 7, 7, 7]), [9, 2, 3, 4]).propose(8)[:2] == [5, 6]
    assert write(drafter(prompt, [8, 2, 3, 4, 7, 7]), [8, 2, 3, 4]).propose(8)[:2] == [7, 7]
    assert write(drafter(prompt, [2, 3, 7], [8, 2, 3, 0, 1]), [9, 8, 2, 3]).propose(8)[:2] == [0, 1]


def test_a_guess_has_room_ends_before_an_end_token_and_waits_for_the_third_token() -> None:
    prompt = list(range(20))
    assert [len(write(drafter(prompt), [2, 3, 4]).propose(room)) for room in (-3, 0, 1, 3, 8, 99)] == [0, 0, 1, 3, 8, 8]
    assert write(drafter(prompt, end=[7]), [2, 3, 4]).propose(8) == [5, 6]
    assert write(drafter(prompt, most=2), [2, 3, 4]).propose(8) == [5, 6]
    assert write(drafter(prompt), [3, 4]).propose(8) == []


def test_examples_are_read_once_and_only_when_a_guess_is_made() -> None:
    reads = []

    def examples() -> Iterator[list[int]]:
        reads.append(1)
        yield [1, 2, 3]

    made = Drafter([5, 6], most=8, length=DraftLength(FREE), examples=examples)
    for token in (7, 8):
        made.append(token)
        made.propose(8)
    assert not reads
    for token in (1, 2, 1, 2):
        made.append(token)
        made.propose(0)
        made.propose(4)
    assert len(reads) == 1


def test_a_guess_beside_others_is_shorter() -> None:
    length = DraftLength(lambda tokens: 1 + 0.1 * tokens)
    made = write(Drafter(list(range(40)), most=8, length=length), range(2, 12))
    assert len(made.propose(8)) > len(made.propose(8, beside=9)) == 0


def test_guesses_are_graded_whether_they_are_drafted_or_not() -> None:
    for cost, right in ((FREE, True), (lambda tokens: float(tokens**3), True), (FREE, False)):
        length = DraftLength(cost)
        made = Drafter(list(range(30)), most=8, length=length)
        before = length.acceptance("text", 3)
        write(made, [99, 3, 4, 5]).propose(8)
        made.append(6 if right else 50)
        assert (length.acceptance("text", 3) > before) == right


def test_many_examples_are_read_a_part_at_a_time() -> None:
    reads: list[int] = []

    def examples() -> Iterator[list[int]]:
        for number in range(10):
            reads.append(number)
            yield [100 * number + token for token in range(100)]

    made = write(Drafter([], most=8, length=DraftLength(FREE), examples=examples), [1, 905, 906])
    for parts in range(1, 4):
        assert made.propose(2) == []
        assert len(reads) == 3 * parts, "256 tokens or more"
    assert made.propose(2) == [907, 908]
    assert len(reads) == 10


@given(
    st.lists(st.integers(0, 2), max_size=20),
    st.lists(st.integers(0, 2), min_size=3, max_size=30),
    st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=3),
    st.integers(0, 9),
)
def test_a_guess_continues_what_the_text_ends_with(
    prompt: list[int], written: list[int], examples: list[list[int]], room: int
) -> None:
    made = drafter(prompt, *examples)
    text = list(prompt)
    for token in written:
        made.append(token)
        text.append(token)
        guess = made.propose(room)
        assert len(guess) <= min(room, 8)
        for first in guess[:1]:
            places = [
                sequence[end]
                for sequence in (text, *examples)
                for end in range(SHORTEST, len(sequence))
                if sequence[end - SHORTEST : end] == text[-SHORTEST:]
            ]
            assert first in places
        if room and not guess and len(text) - len(prompt) >= 3:
            assert not any(text[-LONGEST:] == text[end - LONGEST : end] for end in range(LONGEST, len(text))), (
                "passes cost nothing here, so four tokens that agree are always enough"
            )
