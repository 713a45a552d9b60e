"""Responses in the form of the OpenAI API."""

from __future__ import annotations

import dataclasses

import pytest

from edgecompose import Request
from edgecompose.engine.merged import MergedAdapter, MergeReport
from edgecompose.errors import ApiError, GenerationError, PromptTooLong
from edgecompose.request import Composition
from edgecompose.server import responses
from edgecompose.server.protocol import ApiCall, Kind
from tests.factories_answers import ANSWER, answer


def call(kind: Kind) -> ApiCall:
    return ApiCall(kind, "auto", ("the cat",), Request())


@pytest.mark.parametrize(
    ("kind", "name", "choice"),
    [
        ("chat", "chat.completion", {"message": {"role": "assistant", "content": "sat"}}),
        ("text", "text_completion", {"text": "sat"}),
    ],
)
def test_a_response_has_the_form_of_its_kind(kind: Kind, name: str, choice: dict[str, object]) -> None:
    value = responses.response(call(kind), [ANSWER], "id-1")
    assert (value["id"], value["object"], value["model"]) == ("id-1", name, "auto")
    assert value["choices"] == [{"index": 0, **choice, "logprobs": None, "finish_reason": "stop"}]
    assert value["usage"] == {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}
    assert value["edgecompose"]["weights"] == {"animals": 0.5, "numbers": 0.5}
    assert not {"prompt", "answer", "finish"} & set(value["edgecompose"])


def test_several_prompts_have_several_choices_and_explanations() -> None:
    value = responses.response(call("text"), [ANSWER, answer(text="ran", finish="length")], "id-1")
    assert [(c["index"], c["text"], c["finish_reason"]) for c in value["choices"]] == [
        (0, "sat", "stop"),
        (1, "ran", "length"),
    ]
    assert len(value["edgecompose"]) == 2 and value["usage"]["total_tokens"] == 34


def test_chunks_begin_with_a_role_and_end_with_an_explanation() -> None:
    composition = Composition(ANSWER.retrieval, ANSWER.settings, MergedAdapter({}, "c" * 64, MergeReport()))
    first = responses.first_chunk(call("chat"), "id", composition)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert set(first["edgecompose"]) == {"method", "weights", "distribution", "composition"}
    assert responses.chunk(call("chat"), "id", "at")["choices"][0]["delta"] == {"content": "at"}
    last = responses.last_chunk(call("chat"), "id", ANSWER)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert last["edgecompose"]["composition"] == "c" * 64
    usage = responses.usage_chunk(call("chat"), "id", [ANSWER])
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 17
    assert responses.last_chunk(call("text"), "id", ANSWER)["choices"][0]["text"] == ""


def test_an_explanation_can_be_left_out_but_for_scores_and_a_changed_bundle() -> None:
    brief = dataclasses.replace(call("chat"), explain=False)
    scored = answer(choices={"a": -1.0, "b": -2.0})
    assert "edgecompose" not in responses.response(brief, [ANSWER], "id")
    assert "edgecompose" not in responses.last_chunk(brief, "id", ANSWER)
    assert responses.response(brief, [scored], "id")["edgecompose"] == {"choices": {"a": -1.0, "b": -2.0}}
    assert responses.response(brief, [ANSWER], "id", changed=True)["edgecompose"] == {"bundle_changed": True}
    assert responses.response(call("chat"), [ANSWER], "id", changed=True)["edgecompose"]["bundle_changed"] is True


def test_ids_tell_kinds_apart_and_are_fresh() -> None:
    assert responses.new_id("chat").startswith("chatcmpl-") and responses.new_id("text").startswith("cmpl-")
    assert responses.new_id("embed").startswith("embed-")
    assert len({responses.new_id("chat") for _ in range(9)}) == 9


@pytest.mark.parametrize(
    ("error", "param", "code"),
    [
        (ApiError("no", param="model", code="model_not_found"), "model", "model_not_found"),
        (PromptTooLong("long"), None, "context_length_exceeded"),
        (GenerationError("bad"), None, None),
    ],
)
def test_errors_have_the_fields_of_the_api(error: ApiError, param: str | None, code: str | None) -> None:
    assert responses.error_json(error)["error"] == {
        "message": str(error),
        "type": "invalid_request_error",
        "param": param,
        "code": code,
    }
