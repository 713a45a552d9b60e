"""Regular expressions of strangers, matched in bounded time.

Python's own engine goes back and tries again, which takes exponential time for `(.*.*.*)*Z`. It is used for expressions
where that cannot happen, and they are almost all; for others, each part is looked at once for each place in the text.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from edgecompose.guard.budget import Budget

_LONGEST = 1000
#: Ways through an expression that Python's engine may try.
_MOST_ATTEMPTS = 2_000_000
_REPEATS = {sre.MAX_REPEAT, sre.MIN_REPEAT}
_SINGLE = {sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN}


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CATEGORIES: Mapping[Any, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_WORD: _is_word,
    sre.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    sre.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    sre.CATEGORY_NOT_WORD: lambda c: not _is_word(c),
}


class Pattern:
    """A regular expression.

    Args:
        source: the expression, in Python's syntax, without references to groups, flags and looks behind.
        budget: what all matching may take: the time that Python's engine takes, or ten steps for a look at a part.

    Raises:
        ValueError: it is no expression, has more than 1,000 characters, or has other parts.
    """

    def __init__(self, source: str, budget: Budget) -> None:
        if len(source) > _LONGEST:
            raise ValueError(f"it has {len(source)} characters, expected at most {_LONGEST}")
        try:
            tree = parser.parse(source)
            if tree.state.flags & ~re.UNICODE:
                raise ValueError("flags are not supported")
            self._repeats, self._choices, simple = _shape(tree)
        except (re.error, OverflowError) as error:
            raise ValueError(str(error)) from error
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error
        self._tree, self._budget = tree, budget
        self._compiled = re.compile(source) if simple else None

    def matches(self, text: str) -> bool:
        """Whether the expression matches at the beginning of a text, as `re.match` does.

        It raises the error of the budget where that is used up.
        """
        attempts = max(2, len(text)) ** min(self._repeats, 64) * self._choices
        if self._compiled is not None and attempts <= _MOST_ATTEMPTS:
            begin = time.thread_time_ns()
            match = self._compiled.match(text)
            self._budget.spend(10 + (time.thread_time_ns() - begin) // 100)
            return match is not None
        return bool(_Matcher(text, self._budget).sequence(self._tree, 0))


def _shape(parts: Iterable[Any]) -> tuple[int, int, bool]:
    """Number of repeats, product of the choices beside them, and whether nothing but single characters repeats.

    Raises:
        ValueError: a part is not supported.
    """
    repeats, choices, simple = 0, 1, True
    for kind, value in parts:
        inner: list[Any] = []
        if kind in _REPEATS:
            repeats, choices = repeats + (value[1] > 1), choices * 2
            inner = [value[2]]
            simple = simple and ((len(value[2]) == 1 and value[2][0][0] in _SINGLE) or value[:2] == (0, 1))
        elif kind is sre.BRANCH:
            choices, inner = choices * len(value[1]), value[1]
        elif kind is sre.SUBPATTERN:
            if value[1] or value[2]:
                raise ValueError("flags are not supported")
            inner = [value[3]]
        elif kind in (sre.ASSERT, sre.ASSERT_NOT):
            if value[0] < 0:
                raise ValueError("looking behind is not supported")
            inner, simple = [value[1]], False
        elif kind not in _SINGLE and kind is not sre.AT:
            raise ValueError(f"{str(kind).lower()} is not supported")
        for part in inner:
            more, times, also_simple = _shape(part)
            repeats, choices, simple = repeats + more, choices * times, simple and also_simple
    return repeats, choices, simple


class _Matcher:
    """Where the parts of an expression can end in one text; each part is looked at once for each place."""

    def __init__(self, text: str, budget: Budget) -> None:
        self._text, self._budget = text, budget
        self._ends: dict[tuple[int, int], frozenset[int]] = {}

    def sequence(self, parts: Any, start: int) -> frozenset[int]:
        """Ends of parts that follow each other, the first at `start`."""
        ends = frozenset((start,))
        for part in parts:
            self._budget.spend(5 + 5 * len(ends))
            ends = self._after(part, ends)
            if not ends:
                break
        return ends

    def _after(self, part: Any, starts: frozenset[int]) -> frozenset[int]:
        return frozenset[int]().union(*(self._from(part, start) for start in starts))

    def _from(self, part: Any, start: int) -> frozenset[int]:
        key = id(part), start
        if key not in self._ends:
            self._budget.spend(10)
            self._ends[key] = self._look(part[0], part[1], start)
        return self._ends[key]

    def _look(self, kind: Any, value: Any, start: int) -> frozenset[int]:
        none: frozenset[int] = frozenset()
        if kind in _SINGLE:
            text = self._text
            return frozenset((start + 1,)) if start < len(text) and _is_one(kind, value, text[start]) else none
        if kind is sre.AT:
            return frozenset((start,)) if self._is_at(value, start) else none
        if kind is sre.SUBPATTERN:
            return self.sequence(value[3], start)
        if kind is sre.BRANCH:
            return none.union(*(self.sequence(parts, start) for parts in value[1]))
        if kind in _REPEATS:
            return self._repeat(value[0], value[1], parts=value[2], start=start)
        holds = bool(self.sequence(value[1], start)) == (kind is sre.ASSERT)
        return frozenset((start,)) if holds else none

    def _repeat(self, least: int, most: int, *, parts: Any, start: int) -> frozenset[int]:
        ends, result = frozenset((start,)), frozenset[int]()
        for count in range(min(most, least + len(self._text) + 2) + 1):
            if count >= least:
                result |= ends
            following = frozenset[int]().union(*(self.sequence(parts, end) for end in ends))
            self._budget.spend(10 * len(ends))
            if following == ends:
                return result | ends if count < most else result
            ends = following
            if not ends:
                break
        return result

    def _is_at(self, place: Any, start: int) -> bool:
        text = self._text
        if place in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return start == 0
        if place is sre.AT_END:
            return start == len(text) or text[start:] == "\n"
        if place is sre.AT_END_STRING:
            return start == len(text)
        before = start > 0 and _is_word(text[start - 1])
        behind = start < len(text) and _is_word(text[start])
        return (before != behind) == (place is sre.AT_BOUNDARY)


def _is_one(kind: Any, value: Any, character: str) -> bool:
    """Whether one character is what a part of an expression stands for."""
    if kind is sre.ANY:
        return character != "\n"
    if kind is sre.LITERAL:
        return bool(ord(character) == value)
    if kind is sre.NOT_LITERAL:
        return bool(ord(character) != value)
    negated = bool(value) and value[0][0] is sre.NEGATE
    return any(_is_in(item, character) for item in value[negated:]) != negated


def _is_in(item: Any, character: str) -> bool:
    kind, value = item
    if kind is sre.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    return bool(_CATEGORIES[value](character) if kind is sre.CATEGORY else ord(character) == value)
