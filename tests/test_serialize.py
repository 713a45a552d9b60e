"""Answers, retrievals and adapters as JSON and as text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgecompose import serialize
from edgecompose.engine.device import Device
from edgecompose.retrieval.retriever import Retrieval
from edgecompose.settings import MergeSettings
from tests.factories_answers import ANSWER, RETRIEVAL, answer


def test_an_answer_is_json_without_what_it_lacks() -> None:
    value = json.loads(json.dumps(serialize.answer_json(ANSWER)))
    assert (value["answer"], value["weights"]) == ("sat", {"animals": 0.5, "numbers": 0.5})
    assert value["neighbours"][0] == {"task": "animals", "key": 3, "similarity": 0.75}
    assert value["merge"] == {"rank": 4, "energy": None, "norm_factor": 1.5, "discarded_energy": 0.25}
    assert value["tokens"] == {"prompt": 12, "generated": 5, "dropped": 0, "drafted": 0, "accepted": 0}
    assert "choices" not in value
    assert serialize.answer_json(answer(choices={"yes": -0.5}))["choices"] == {"yes": -0.5}


def test_an_answer_is_explained_in_lines() -> None:
    lines = serialize.explain_answer(ANSWER)
    assert "adapters      animals 0.500, numbers 0.500" in lines
    assert "method        svd (rank 4, 25.0% of the squared norm cut off), composition cccccccccccc, attached" in lines
    assert "tokens        12 in the prompt, 5 in the answer, 50 tokens/s" in lines
    guarded = answer(settings=MergeSettings(norm_guard=True), attachment="fuse", prompt_form="chat")
    text = "\n".join(serialize.explain_answer(guarded))
    assert "product (norm guard 1.500), composition cccccccccccc, fused" in text
    assert "12 in the prompt, in the chat template" in text
    assert "drafted" not in text
    drafts = answer(drafted_tokens=9, accepted_tokens=4)
    assert "drafts        4 of 9 drafted tokens were accepted" in serialize.explain_answer(drafts)
    tokens = serialize.answer_json(drafts)["tokens"]
    assert (tokens["drafted"], tokens["accepted"]) == (9, 4)


def test_choices_are_ranked_and_an_embedder_elsewhere_is_named() -> None:
    other = Device("cpu", (), "cuda has no kernels for an int8 embedder")
    shown = answer(choices={"no": -2.0, "yes": -0.5}, device=Device("cuda", (), "cuda works"), embedder_device=other)
    lines = serialize.explain_answer(shown)
    first = lines.index("choices       mean log-likelihood a token")
    assert [line.split()[-1] for line in lines[first + 1 : first + 3]] == ["yes", "no"]
    assert "embedder      cpu (cuda has no kernels for an int8 embedder)" in lines
    assert not any("tokens/s" in line for line in lines)


def test_a_retrieval_shows_its_nucleus_or_the_base_alone() -> None:
    lines = serialize.explain_retrieval(RETRIEVAL)
    assert [line for line in lines if line.strip().startswith("*")] == [line for line in lines if " 60.0%" in line]
    assert serialize.explain_retrieval(Retrieval((), {}, {}, {})) == ["adapters      none (the base alone)"]


def test_cosines_and_adapters_that_oppose_each_other() -> None:
    inner = np.array([[4.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    value = serialize.compatibility_json(["a", "b", "c"], inner)
    assert value["norms"] == {"a": 2.0, "b": 1.0, "c": 0.0}
    assert value["cosines"]["a"] == {"b": pytest.approx(-0.5), "c": 0.0}
    assert serialize.describe_compatibility(value)[-1] == "against each other: a and b (-0.500)"
