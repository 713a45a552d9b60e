"""How many tokens to draft: as many as pay, by how often guesses like this one were right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

#: Where a guess comes from: prompt and answer, or the answers of the retrieved examples.
Source = Literal["text", "examples"]
#: Guesses are told apart by how many tokens agree before them: at least so many -> how often such a guess is right
#: where nothing was seen, which counts as `_PRIOR_WEIGHT` guesses. Two tokens agree by chance: such a guess has to be
#: right once before it is drafted.
_PRIOR = {2: 0.1, 3: 0.3, 4: 0.6, 8: 0.85}
_PRIOR_WEIGHT = 2.0
#: What an observation counts after each later one of its kind: about the last twenty matter.
_DECAY = 0.95
#: Drafts have to be so much faster by the estimate, which is none of the exact.
_GAIN = 1.03


class DraftLength:
    """Chooses the number of drafted tokens of each pass of a sequence.

    Every guess is graded, drafted or not, so that text which begins to repeat itself is noticed at no cost.

    Args:
        cost: what a pass of so many tokens costs, in any unit.
    """

    def __init__(self, cost: Callable[[int], float]) -> None:
        self._cost = cost
        #: Kind of guess -> (right ones, all), weighted by age.
        self._records: dict[tuple[Source, int], tuple[float, float]] = {}

    def choose(self, source: Source, agreement: int, most: int, *, beside: int = 0) -> int:
        """The number of tokens, in 0 .. `most`, that gives the most tokens a second.

        Args:
            agreement: tokens before the guess that agree, 2 or more.
            beside: other sequences in the pass, each of which it makes as much longer and gives no more than a token.
        """
        share = self.acceptance(source, agreement)
        sequences = 1 + beside
        best, fastest, expected, alive = 0, _GAIN * sequences / self._cost(sequences), 1.0, 1.0
        for count in range(1, most + 1):
            alive *= share
            expected += alive
            rate = (beside + expected) / self._cost(sequences * (count + 1))
            if rate > fastest:
                best, fastest = count, rate
        return best

    def observe(self, source: Source, agreement: int, *, right: bool) -> None:
        """Grade one token of a guess; those behind a wrong one are not graded."""
        correct, guesses = self._record(source, agreement)
        self._records[source, _kind(agreement)] = correct * _DECAY + right, guesses * _DECAY + 1

    def acceptance(self, source: Source, agreement: int) -> float:
        """The estimated probability that a token of such a guess is right."""
        correct, guesses = self._record(source, agreement)
        return correct / guesses

    def _record(self, source: Source, agreement: int) -> tuple[float, float]:
        kind = _kind(agreement)
        return self._records.get((source, kind), (_PRIOR_WEIGHT * _PRIOR[kind], _PRIOR_WEIGHT))


def _kind(agreement: int) -> int:
    return max(least for least in _PRIOR if least <= agreement)
