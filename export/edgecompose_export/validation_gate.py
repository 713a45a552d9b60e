"""The validation gate of adapters: whether each beats the base on its own task's validation examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecompose.bundle.records import read_json
from edgecompose.bundle.specs import Validation, verdict_of
from edgecompose.errors import ExportError

#: The variant that is tested, and the one that it has to beat.
_OWN, _BASE = "own", "base"


def read_validation(path: Path) -> dict[str, Validation]:
    """Task -> what its adapter gains, out of the JSON of `edgecompose eval BUNDLE DATA --methods base,own --json`.

    Raises:
        ExportError: unreadable, or not an evaluation of `own` against `base`.
    """
    evaluation = read_json(path, ExportError, "make it again")
    try:
        own, base = (evaluation["variants"][name]["tasks"] for name in (_OWN, _BASE))
        gains = evaluation["against"][_BASE]["by_task"]
        if evaluation["main"] != _OWN:
            raise ValueError(f"its main variant is {evaluation['main']!r}")
        return {task: _validation(score, base[task], gains[task]) for task, score in own.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(
            f"'{path}' is no evaluation of own adapters against the base ({type(error).__name__}: {error}); "
            "make it with 'edgecompose eval BUNDLE DATA --methods base,own --json'"
        ) from error


def _validation(own: Mapping[str, Any], base: Mapping[str, Any], gain: Mapping[str, Any]) -> Validation:
    low, high = map(float, gain["ci95"])
    return Validation(
        verdict_of(low, high), int(own["n"]), float(base["accuracy"]), float(own["accuracy"]), (low, high)
    )
