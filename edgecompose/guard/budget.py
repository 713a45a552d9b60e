"""What a stranger's program may take, in steps and bytes: the same on fast machines and slow ones.

Beside the budget stand the costs of Python's operations on texts: what a result takes at most, known before it is made.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from edgecompose.errors import EdgeComposeError


def words(text: str) -> frozenset[str]:
    """Words between spaces."""
    return frozenset(text.split())


_SEQUENCES = (str, list, tuple)
#: Longer numbers cost the square of their bits.
_MOST_BITS = 1 << 14
_VIEWS = (KeysView, ValuesView, ItemsView)
#: Methods whose cost is known.
_METHODS: Mapping[type, frozenset[str]] = {
    str: words(
        "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit "
        "isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition "
        "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper zfill"
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}
_PADDING = frozenset(("center", "ljust", "rjust", "zfill"))
#: They search from the end, where Python compares at every place.
_BACKWARDS = frozenset(("rfind", "rindex", "rsplit", "rpartition"))


class Budget:
    """Steps (about a tenth of a microsecond each), bytes and characters of output that are left.

    Args:
        exceeded: the error to raise, from what is used up: 'time', 'memory' or 'output'.
    """

    __slots__ = ("_exceeded", "bytes", "output", "steps")

    def __init__(self, *, steps: int, size: int, output: int, exceeded: Callable[[str], EdgeComposeError]) -> None:
        self.steps, self.bytes, self.output, self._exceeded = steps, size, output, exceeded

    def spend(self, steps: int) -> None:
        """Take steps; raise the error where fewer are left."""
        self.steps -= steps
        if self.steps < 0:
            raise self._exceeded("time")

    def grow(self, size: int) -> None:
        """Take bytes, and the steps of writing them; raise the error where fewer are left."""
        self.bytes -= size
        if self.bytes < 0:
            raise self._exceeded("memory")
        self.spend(size >> 6)

    def write(self, parts: Iterable[str]) -> Iterator[str]:
        """The parts of an output; raise the error where they become too long."""
        for part in parts:
            self.output -= len(part)
            if self.output < 0:
                raise self._exceeded("output")
            yield part

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """Items, two steps each."""
        for item in items:
            self.spend(2)
            yield item

    def measure(self, value: Any) -> int:
        """Bytes that a value takes as text without escapes; what is in it several times counts as often.

        Every step of looking is taken from the budget, so that a few nested lists which stand for billions end it.
        """
        if isinstance(value, str):
            size = bytes_of(value)
            self.spend(size >> 6)
            return size
        total, left = 0, [value]
        while left:
            item = left.pop()
            total += 16
            if isinstance(item, str):
                total += bytes_of(item)
            elif isinstance(item, int):
                total += item.bit_length()
            elif isinstance(item, dict):
                self.spend(2 + 2 * len(item))
                left += itertools.chain(item, item.values())
            elif isinstance(item, range):
                self.spend(len(item) >> 2)
            elif isinstance(item, (list, tuple, *_VIEWS)):
                self.spend(2 + len(item))
                left += item
        self.spend(total >> 6)
        return total


def bytes_of(value: str | list[Any] | tuple[Any, ...]) -> int:
    """Bytes of a text, or of a list without what is in it."""
    if isinstance(value, str):
        return len(value) if value.isascii() else 4 * len(value)
    return 8 * len(value)


def length_of(value: Any) -> int:
    """Length of a collection or text, 1 of anything else."""
    return len(value) if hasattr(value, "__len__") else 1


def width_of(values: Iterable[Any]) -> int:
    """What arguments ask for: numbers, and lengths of texts."""
    return sum(len(v) if isinstance(v, str) else abs(v) for v in values if isinstance(v, (str, int)))


def has_method(owner: Any, name: str) -> bool:
    """Whether the cost of a method of a value is known."""
    return any(isinstance(owner, kind) and name in names for kind, names in _METHODS.items())


def take_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Take the cost of an arithmetic operator of Python from a budget."""
    if operator == "+" and isinstance(left, _SEQUENCES) and isinstance(right, _SEQUENCES):
        budget.grow(bytes_of(left) + bytes_of(right))
    elif operator == "%" and isinstance(left, str):
        take_format(budget, left, right)
    elif operator == "*" and isinstance(left, int) and isinstance(right, int):
        _take_number(budget, left.bit_length() + right.bit_length())
    elif operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, _SEQUENCES) and isinstance(other, int):
                budget.grow(bytes_of(one) * max(other, 0))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _take_number(budget, left.bit_length() * abs(right))


def take_round(budget: Budget, value: Any, args: tuple[Any, ...]) -> None:
    """Take the cost of rounding to decimals; only numbers are rounded."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{type(value).__name__} cannot be rounded")
    for decimals in args:
        if isinstance(decimals, int):
            _take_number(budget, 4 * abs(decimals))


def take_method(budget: Budget, owner: Any, name: str, args: tuple[Any, ...]) -> None:
    """Take the cost of a method of a value from a budget."""
    size = budget.measure(args)
    if not isinstance(owner, str):
        if name == "copy":
            budget.grow(8 * len(owner))
        elif name in ("count", "index"):
            budget.measure(owner)
        return
    own = bytes_of(owner)
    if name in _PADDING:
        own += 4 * width_of(args)
    elif name == "expandtabs":
        own += owner.count("\t") * width_of(args or (8,))
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str):
        own += owner.count(args[0]) * width_of(args[1:2])
    elif name == "join":
        own = 3 * size + own * sum(map(length_of, args))
    elif name in ("split", "rsplit", "splitlines"):
        by = args[0] if args and isinstance(args[0], str) and args[0] else None
        own += 16 * (1 + (len(owner) // 2 if by is None else owner.count(by)))
    if name in _BACKWARDS:
        budget.spend(len(owner) * min(width_of(args[:1]), len(owner)) >> 6)
    budget.grow(4 * own)


def take_format(budget: Budget, text: str, values: Any) -> None:
    """Take what a formatted text may take at most: the values in every field, and all widths."""
    size, fields = budget.measure(values), 1 + text.count("%") + text.count("{")
    widths = sum(int(digits[:18]) for digits in re.findall(r"[0-9]+", text))
    if "*" in text or re.search(r"\{[^{}]*\{", text):
        widths += sum(map(abs, _numbers(values)))
    budget.grow(bytes_of(text) + widths * fields + 12 * fields * size)


def _take_number(budget: Budget, bits: int) -> None:
    budget.grow(bits if bits <= _MOST_BITS else bits * bits)


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers in nested values, which a format may take as widths."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
