"""The script of the chat page, in Node with elements that only remember."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgecompose.server.http import app

SCRIPT = Path(app.__file__).parent / "templates" / "chat.js"
HARNESS = Path(__file__).with_name("page_harness.js")


@pytest.fixture(scope="module")
def seen() -> Any:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node")
    done = subprocess.run([node, HARNESS, SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_limit_is_sent_where_none_was_given(seen: Any) -> None:
    assert "max_tokens" not in seen["firstBody"]


def test_a_new_conversation_holds_nothing_of_the_answer_that_it_ended(seen: Any) -> None:
    assert seen["afterReset"] == [{"role": "user", "content": "and again"}]
    assert [message["content"] for message in seen["history"]] == ["and again", "Yes", "more"]


def test_who_waits_is_told_so_and_an_answer_that_was_cut_says_it(seen: Any) -> None:
    assert "Waiting" in seen["waiting"]
    assert "Cut at 7 tokens" in seen["cut"]


def test_the_blend_is_shown_before_the_first_token_and_empty_tables_are_not(seen: Any) -> None:
    assert "ties of 1 adapter" in seen["whyEarly"]
    assert seen["hiddenTables"] is True


def test_the_conversation_is_followed(seen: Any) -> None:
    assert seen["scrolled"] is True


def test_a_message_that_got_no_answer_comes_back(seen: Any) -> None:
    assert (seen["error"], seen["returned"]) == ("the server is ending", "more")
