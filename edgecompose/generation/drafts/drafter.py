"""Guesses the next tokens of an answer by looking up how its last ones were continued before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from edgecompose.generation.drafts.draft_length import DraftLength, Source
from edgecompose.generation.drafts.ngrams import NgramIndex

#: Lengths of the n-grams that are looked up, and how many tokens before a guess are compared with those of the text.
SHORTEST, LONGEST, COMPARED = 2, 4, 8
#: Tokens of an answer before the first guess: an answer that is shorter costs no index.
_FIRST = 3
#: Tokens of examples that are read before a guess, at least where there are so many: the rest waits for the next one,
#: so that no pass waits long.
_READ = 256


class Drafter:
    """The tokens of one sequence, and guesses of its next ones (prompt lookup decoding).

    The longest n-gram that the text ends with is looked up in the text itself, latest place first, then in `examples`.

    Args:
        prompt: ids that the sequence begins with.
        most: tokens of a guess, at most.
        length: decides how many of a guess are worth a pass.
        examples: gives other sequences, the most alike first; called once, and read as they are needed.
        end: ids that no guess has.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        most: int,
        length: DraftLength,
        examples: Callable[[], Iterable[Sequence[int]]] = tuple,
        end: Collection[int] = (),
    ) -> None:
        self._most, self._length, self._end = most, length, frozenset(end)
        self._load: Callable[[], Iterable[Sequence[int]]] = examples
        self._text = NgramIndex(SHORTEST, LONGEST, latest=True)
        self._examples = NgramIndex(SHORTEST, LONGEST, latest=False)
        self._sequences: Iterator[Sequence[int]] | None = None
        self._unread, self._written = list(prompt), 0
        self._last = deque(prompt, COMPARED)
        self._kind: tuple[Source, int] = ("text", SHORTEST)
        self._expected: deque[int] = deque()

    def append(self, token: int) -> None:
        """Add a token of the answer, and grade the guess that was made of it."""
        if self._expected:
            right = self._expected.popleft() == token
            self._length.observe(*self._kind, right=right)
            if not right:
                self._expected.clear()
        self._unread.append(token)
        self._last.append(token)
        self._written += 1

    def propose(self, room: int, *, beside: int = 0) -> list[int]:
        """Tokens that are worth trying in the next pass, none where nothing is known.

        Args:
            room: how many tokens may be drafted; there is none where it is negative.
            beside: other sequences in the pass.
        """
        self._expected.clear()
        if room < 1 or self._written < _FIRST:
            return []
        guess = self._guess()
        self._expected.extend(guess)
        most = min(room, len(guess))
        return guess[: self._length.choose(*self._kind, most, beside=beside)] if guess else []

    def _guess(self) -> list[int]:
        """The continuation of the longest match, and what kind of guess that is; empty where there is none."""
        self._text.extend(self._unread)
        self._unread.clear()
        self._read_examples()
        last = list(self._last)
        indexes: tuple[tuple[Source, NgramIndex], ...] = ("text", self._text), ("examples", self._examples)
        matches = [(source, index, index.find(last[-LONGEST:])) for source, index in indexes]
        source, index, match = max(matches, key=lambda item: 0 if item[2] is None else item[2].length)
        if match is None:
            return []
        self._kind = source, index.agreement(match, last)
        return index.read(match, self._most, end=self._end)

    def _read_examples(self) -> None:
        """Look up in some more of the examples; those that come first count first."""
        if self._sequences is None:
            self._sequences = iter(self._load())
        enough = len(self._examples) + _READ
        for ids in self._sequences:
            self._examples.extend(ids)
            self._examples.begin()
            if len(self._examples) >= enough:
                return
