"""A short seeded attack on the server: whatever comes in, no internal error, no traceback, no open end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from edgecompose.errors import ApiError
from tests.attack.requests_targets import TARGETS
from tests.attack.target import Target

#: It starts processes; `make check` leaves it out.
pytestmark = pytest.mark.slow

CASES = {"requests": 500, "jsonrpc": 500}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_whatever_comes_in_is_answered(target: Target, tmp_path: Path) -> None:
    target.prepare(tmp_path)
    assert target.attempt(tmp_path) == "accepted"
    outcomes = {"accepted": 0, "refused": 0}
    for number in range(CASES[target.name]):
        target.mutate(random.Random(f"7:{target.name}:{number}"), tmp_path)
        try:
            outcomes[target.attempt(tmp_path)] += 1
        except ApiError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > CASES[target.name] / 10
