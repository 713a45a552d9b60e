"""Answers made by hand, for tests of what shows them."""

from __future__ import annotations

import dataclasses
from typing import Any

from edgecompose.engine.device import Device
from edgecompose.engine.merged import MergeReport
from edgecompose.request import Answer
from edgecompose.retrieval.index import Neighbour
from edgecompose.retrieval.retriever import Retrieval
from edgecompose.settings import MergeSettings
from edgecompose.timing import STAGES

RETRIEVAL = Retrieval(
    neighbours=(Neighbour("animals", 3, 0.75), Neighbour("colours", 9, 0.5)),
    distribution={"animals": 0.6, "colours": 0.4},
    nucleus={"animals": 1.0},
    weights={"animals": 0.5, "numbers": 0.5},
)
ANSWER = Answer(
    prompt="the cat",
    text="sat",
    retrieval=RETRIEVAL,
    settings=MergeSettings("svd", rank=4),
    composition="c" * 64,
    device=Device("cpu", ("CPUExecutionProvider",), "cpu was requested"),
    timings_ms={**dict.fromkeys(STAGES, 1.0), "decode": 100.0},
    prompt_tokens=12,
    generated_tokens=5,
    report=MergeReport(norm_factor=1.5, discarded_energy=0.25),
)


def answer(**fields: Any) -> Answer:
    """ANSWER with other fields."""
    return dataclasses.replace(ANSWER, **fields)
