"""Text as tokens come: whole characters, stop strings, and what is held back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.generation.stopping import AnswerText, StopStrings
from edgecompose.generation.tokenizer import Tokenizer
from tests.factories import write_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path / "tokenizer.json"))


def _shown(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """What each token shows, and at the end what was held back."""
    text = AnswerText(tokenizer, stop)
    return [*(text.push(token) for token in ids), text.finish()]


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "👩‍👩‍👧 ok", "a\ufffdb", "e\u0301"])
def test_a_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    parts = _shown(tokenizer, ids)
    assert "".join(parts) == text
    assert "\ufffd" in text or all("\ufffd" not in part for part in parts)


def test_text_is_shown_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    assert _shown(tokenizer, tokenizer.encode("aé日")) == ["a", "", "é", "", "", "日", ""]


def test_what_was_held_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    assert _shown(tokenizer, tokenizer.encode("a日")[:-1]) == ["a", "", "", "\ufffd"]
    assert _shown(tokenizer, tokenizer.encode("one\n"), ["\n\n"]) == ["o", "n", "e", "", "\n"]
    assert _shown(tokenizer, tokenizer.encode(" é")[:2], ["é"]) == ["", "", "\ufffd"]


def test_leading_white_space_is_dropped_and_no_other(tokenizer: Tokenizer) -> None:
    assert "".join(_shown(tokenizer, tokenizer.encode(" \n\t a b \n"))) == "a b \n"
    assert _shown(tokenizer, tokenizer.encode("  ")) == ["", "", ""]


def test_a_text_that_goes_on_keeps_its_white_space_and_may_stop_at_it(tokenizer: Tokenizer) -> None:
    def shown(ids: Sequence[int]) -> str:
        text = AnswerText(tokenizer, keep_space=True)
        return "".join((*(text.push(token) for token in ids), text.finish()))

    assert shown(tokenizer.encode("\n    return 1")) == "\n    return 1"
    text = AnswerText(tokenizer, ["\n"], keep_space=True)
    assert (text.push(tokenizer.encode("\n")[0]), text.stopped) == ("", True)


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a</s>b")
    assert len(ids) == 3 and "".join(_shown(tokenizer, ids)) == "ab"


@given(
    st.text("ab\nc", max_size=12),
    st.lists(st.text("ab\nc", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 3), min_size=12, max_size=12),
)
def test_stop_strings_cut_where_the_whole_text_would_be_cut(text: str, stop: list[str], sizes: list[int]) -> None:
    guard, shown, rest = StopStrings(stop), "", text
    result = False
    for size in sizes:
        part_of_it, rest = rest[:size], rest[size:]
        part, result = guard.push(part_of_it)
        shown += part
        assert text.startswith(shown)
        if result:
            break
    shown += "" if result else guard.finish()
    # the first that is complete ends the answer, as it would if every character came by itself
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert result == bool(ends)
    if not result:
        assert shown == text
    else:
        assert not any(s in shown for s in stop)
        assert any(text.startswith(shown + s) for s in stop)
