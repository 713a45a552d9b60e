"""Where the n-grams of token sequences are continued."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

#: Ids are below 2**24 (`bundle.specs.MOST_VOCABULARY`), so that an n-gram is one integer.
_BITS = 24
#: What stands between two sequences; no id.
_GAP = -1


@dataclass(frozen=True, slots=True)
class Match:
    """An n-gram of an index that a text ends with.

    Attributes:
        continuation: where the token after the n-gram stands in the index.
        length: tokens of the n-gram.
    """

    continuation: int
    length: int


class NgramIndex:
    """Sequences, and where each of their n-grams of `shortest` to `longest` tokens is continued.

    Adding a token takes a constant time. Where an n-gram stands at several places, the last one counts if `latest`, or
    else the first.
    """

    def __init__(self, shortest: int, longest: int, *, latest: bool) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._latest = latest
        self._tokens: list[int] = []
        self._places: dict[int, dict[int, int]] = {length: {} for length in self._lengths}
        self._recent, self._run = 0, 0  # the last `longest` tokens as an integer; tokens since the last gap

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, ids: Sequence[int]) -> None:
        """Continue the last sequence.

        Args:
            ids: token ids in 0 .. 2**24 - 1.
        """
        most = self._lengths[0]
        for token in ids:
            place = len(self._tokens)
            for length in self._lengths:
                if length <= self._run:
                    places, ngram = self._places[length], _last(self._recent, length)
                    if self._latest:
                        places[ngram] = place
                    else:
                        places.setdefault(ngram, place)
            self._tokens.append(token)
            self._recent, self._run = _last(self._recent << _BITS | token, most), self._run + 1

    def begin(self) -> None:
        """Begin a new sequence; no n-gram spans two."""
        self._tokens.append(_GAP)
        self._recent, self._run = 0, 0

    def find(self, text: Sequence[int]) -> Match | None:
        """The longest n-gram that `text` ends with and that is continued somewhere; None where there is none.

        Args:
            text: the last tokens of a text, as many as the longest n-gram has where there are so many.
        """
        packed = 0
        for token in text:
            packed = packed << _BITS | token
        for length in self._lengths:
            if length <= len(text):
                place = self._places[length].get(_last(packed, length))
                if place is not None:
                    return Match(place, length)
        return None

    def agreement(self, match: Match, text: Sequence[int]) -> int:
        """How many tokens before the match are the last ones of `text`: the length of the match, or more."""
        count = match.length
        while count < len(text) and count < match.continuation:
            if self._tokens[match.continuation - 1 - count] != text[len(text) - 1 - count]:
                break
            count += 1
        return count

    def read(self, match: Match, count: int, *, end: Collection[int] = ()) -> list[int]:
        """Up to `count` tokens from the match on: to the end of its sequence, or the first token of `end`.

        The last sequence goes on as its own copy, as where a text repeats itself.
        """
        tokens: list[int] = []
        for place in range(match.continuation, match.continuation + count):
            beyond = place - len(self._tokens)
            token = self._tokens[place] if beyond < 0 else tokens[beyond]
            if token == _GAP or token in end:
                break
            tokens.append(token)
        return tokens


def _last(packed: int, length: int) -> int:
    """The last `length` tokens of an n-gram."""
    return packed & ((1 << _BITS * length) - 1)
