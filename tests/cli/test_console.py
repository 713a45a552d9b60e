"""Progress shows at a terminal that can be redrawn, and nowhere else."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.cli.processes import Terminal, environment

CHILD = """
from edgecompose.cli.console import counting, counting_bytes
with counting("answering", 2) as advance:
    advance(1)
with counting_bytes("hashing", 2) as advance:
    advance(2)
print("END")
"""


@pytest.mark.parametrize(("variables", "shows"), [({}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, True)])
def test_progress_shows_at_a_terminal(variables: dict[str, str], shows: bool) -> None:
    with Terminal([sys.executable, "-c", CHILD], variables) as terminal:
        terminal.wait_for("END")
        assert terminal.exit_code() == 0
        assert ("answering" in terminal.shown) == ("hashing" in terminal.shown) == ("\x1b[" in terminal.shown) == shows
        has_colours = re.search(r"\x1b\[[39]\d[;m]", terminal.shown) is not None
        assert has_colours == (shows and "NO_COLOR" not in variables)


def test_progress_is_silent_in_a_file_even_where_colours_are_forced() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, env=environment(FORCE_COLOR="1"), check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "END\n", "")
