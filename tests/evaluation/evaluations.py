"""Examples and a request of evaluations."""

from __future__ import annotations

from edgecompose import Request
from edgecompose.evaluation.examples import EvalExample
from edgecompose.settings import RetrievalSettings
from tests.fixtures_tiny import TASKS

REQUEST = Request(retrieval=RetrievalSettings(neighbours=9, nucleus=1.0), max_tokens=3)
EXAMPLES = [
    *(EvalExample(task, f"{prompt} now", "yes", ("yes", "no")) for task in TASKS for prompt in TASKS[task][:2]),
    EvalExample("animals", "which dog?", "a dog", aliases=("dog",)),
    EvalExample("birds", "does a hen fly?", "no", ("yes", "no", "a little")),
]
