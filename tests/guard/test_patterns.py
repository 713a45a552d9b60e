"""Expressions match as Python's do, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompose.errors import AdapterError
from edgecompose.guard import patterns
from edgecompose.guard.budget import Budget
from edgecompose.guard.patterns import Pattern

ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        r"\w",
        r"\s",
        r"\D",
        "[ab]",
        "[^a]",
        "[0-9]",
        "[^0-9.]",
        r"[\w.]",
        "$",
        "^",
        r"\b",
        r"\B",
    ]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
    ),
    max_leaves=6,
)


def budget() -> Budget:
    return Budget(steps=3_000_000, size=0, output=0, exceeded=lambda what: AdapterError(f"limit of {what}"))


@settings(max_examples=300)
@given(EXPRESSIONS, st.text("ab.1_ \n", min_size=1, max_size=8))
def test_an_expression_matches_where_python_says(source: str, text: str) -> None:
    expected = re.match(source, text) is not None
    assert Pattern(source, budget()).matches(text) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_MOST_ATTEMPTS", -1)
        assert Pattern(source, budget()).matches(text) == expected


@pytest.mark.parametrize(
    "source",
    [
        "(.*.*.*.*.*.*)*Z",
        "(a+)+$b",
        "(a|a)*Z",
        "(a|aa)+Z",
        "a?" * 40 + "a" * 40 + "Z",
        "(a|a)" * 40 + "Z",
        "((a{1,50}){1,50}){1,50}Z",
        "(a*)*" * 20 + "Z",
        "(?=(a+)+Z)a",
        "(?:a?){4294967290}Z",
        ".*" * 300 + "Z",
    ],
)
def test_an_expression_that_tries_again_and_again_ends(source: str) -> None:
    """Python would take longer than anybody waits."""
    before = time.process_time()
    try:
        assert not Pattern(source, budget()).matches("a" * 60)
    except AdapterError as error:
        assert str(error) == "limit of time"
    assert time.process_time() - before < 20


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("[", "unterminated"),
        (r"(a)\1", "groupref is not supported"),
        ("(?<=a)b", "looking behind"),
        ("(?i:a)", "flags"),
        ("(?i)a", "flags"),
        ("a" * 2000, "2000 characters"),
        ("(" * 400 + ")" * 400, "nested too deep|takes"),
        ("a{99999999999999999999}", "too large"),
    ],
)
def test_what_cannot_be_matched_is_refused(source: str, message: str) -> None:
    try:
        Pattern(source, budget()).matches("aaa")
    except ValueError as error:
        assert re.search(message, str(error)), str(error)
    else:
        assert source.startswith("(((")
