"""Costs that are known before an operation are at least those of its result."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.errors import GenerationError
from edgecompose.guard.budget import Budget, has_method, take_format, take_method, take_operator

TEXT = st.text(max_size=20)
SMALL = st.integers(0, 60)


def budget(size: int = 1 << 40) -> Budget:
    return Budget(steps=1 << 40, size=size, output=10, exceeded=lambda what: GenerationError(f"limit of {what}"))


def taken(action: Any) -> int:
    full = budget()
    action(full)
    return (1 << 40) - full.bytes


def utf8(value: Any) -> int:
    return len(str(value).encode("utf-8", "replace"))


@given(TEXT, TEXT, SMALL)
def test_operators_cost_what_they_make(left: str, right: str, count: int) -> None:
    assert taken(lambda b: take_operator(b, "+", left, right)) >= utf8(left + right)
    assert taken(lambda b: take_operator(b, "*", left, count)) >= utf8(left * count)
    assert taken(lambda b: take_operator(b, "*", count, left)) >= utf8(left * count)


CALLS = st.one_of(
    st.tuples(st.sampled_from(["center", "ljust", "rjust"]), st.tuples(SMALL, st.sampled_from("xé"))),
    st.tuples(st.just("zfill"), st.tuples(SMALL)),
    st.tuples(st.just("expandtabs"), st.tuples(SMALL)),
    st.tuples(st.just("replace"), st.tuples(st.text("ab", max_size=2), TEXT)),
    st.tuples(st.just("join"), st.tuples(st.lists(TEXT, max_size=5))),
    st.tuples(st.sampled_from(["upper", "lower", "title", "casefold", "swapcase", "strip"]), st.just(())),
)


@given(st.text("ab\tßé", max_size=20) | TEXT, CALLS)
def test_methods_cost_what_they_make(owner: str, call: tuple[str, Any]) -> None:
    name, args = call
    assert has_method(owner, name)
    assert taken(lambda b: take_method(b, owner, name, args)) >= utf8(getattr(owner, name)(*args))


@given(SMALL, SMALL, TEXT)
def test_formats_cost_what_they_make(width: int, other: int, text: str) -> None:
    for form, values in ((f"%{width}d|%*d", (1, other, 2)), ("%s%r", (text, [text])), (f"%.{width}f", (1.5,))):
        assert taken(lambda b, f=form, v=values: take_format(b, f, v)) >= utf8(form % values)
    assert taken(lambda b: take_format(b, "{:{}}{:9}", ((1, width, 2), {}))) >= utf8("{:{}}{:9}".format(1, width, 2))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_a_measure_is_at_least_a_tenth_of_the_text(value: Any) -> None:
    assert 10 * budget().measure(value) >= utf8(value)


def test_what_stands_for_billions_is_not_looked_at_for_long() -> None:
    value: Any = ["x"]
    for _ in range(200):
        value = [value, value]
    small = Budget(steps=10_000, size=1, output=1, exceeded=lambda what: GenerationError(what))
    with pytest.raises(GenerationError, match="time"):
        small.measure(value)


def test_each_limit_has_its_name() -> None:
    with pytest.raises(GenerationError, match="limit of memory"):
        budget(size=10).grow(11)
    with pytest.raises(GenerationError, match="limit of output"):
        list(budget().write(["12345", "123456"]))
    with pytest.raises(GenerationError, match="limit of time"):
        budget().spend(1 << 41)
    assert list(budget().write(["12345", "12345"])) == ["12345", "12345"]
    with pytest.raises(GenerationError, match="limit of memory"):
        take_operator(budget(size=1 << 20), "**", 10, 10**9)
