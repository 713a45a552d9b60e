"""Calls in the form of the OpenAI API: what they mean, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from edgecompose.bundle.manifest import Defaults
from edgecompose.errors import ApiError, EdgeComposeError
from edgecompose.generation.messages import Message
from edgecompose.request import Request
from edgecompose.server.config import CallLimits
from edgecompose.server.protocol import ApiCall, parse_call, parse_inputs
from edgecompose.settings import MergeSettings, RetrievalSettings, Sampling

LIMITS = CallLimits(max_tokens=100, choices=3, choice_characters=20, prompts=3, inputs=3, stop_characters=5)
TALK = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ApiCall:
    defaults = Defaults(merge=MergeSettings("svd", energy=0.9), max_tokens=10)
    return parse_call("chat", {"messages": TALK, **fields}, defaults=defaults, limits=LIMITS, context=1000)


def text(**fields: Any) -> ApiCall:
    defaults = Defaults(max_tokens=10)
    return parse_call("text", {"prompt": "x", **fields}, defaults=defaults, limits=LIMITS, context=1000)


def test_a_bare_call_takes_the_defaults() -> None:
    request = chat()
    assert request.prompts == ((Message("user", "hello"),),)
    assert request.request == Request(max_tokens=10, prompt_cache=True)
    assert (request.model, request.stream, request.usage, request.explain) == ("auto", False, False, True)
    assert text().request == Request(max_tokens=10, raw=True)


@pytest.mark.parametrize(
    ("value", "most", "expected"),
    [
        (None, None, None),
        (-1, None, 1000),
        (7, None, 7),
        (5000, None, 1000),
        (None, 100, 100),
        (-1, 100, 100),
        (8192, 100, 100),
        (7, 100, 7),
        (5, 4096, 5),
        (10**300, 4096, 1000),
    ],
)
def test_the_longest_answer_is_clamped_and_never_refused(
    value: int | None, most: int | None, expected: int | None
) -> None:
    limits = CallLimits(max_tokens=most)
    call = parse_call(
        "chat", {"messages": TALK, "max_tokens": value}, defaults=Defaults(max_tokens=200), limits=limits, context=1000
    )
    assert call.request.max_tokens == expected


def test_every_field_reaches_the_request() -> None:
    request = chat(
        model="task:snli",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=3,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
        user="me",
        metadata={"x": 1},
        edgecompose={
            "exclude": ["cb"],
            "neighbours": 9,
            "routing_temperature": 0.2,
            "nucleus": 0.8,
            "fallback": 0.1,
            "shortcut": 0.9,
            "class_size_exponent": 0.5,
            "route_by": "first",
            "overflow": "truncate",
            "raw": False,
            "method": "ties",
            "density": 0.3,
            "prompt_cache": False,
            "drafts": 3,
            "choices": ["yes", "no"],
        },
    )
    assert request.request == Request(
        exclude=("cb",),
        retrieval=RetrievalSettings(
            neighbours=9, routing_temperature=0.2, nucleus=0.8, class_size_exponent=0.5, shortcut=0.9, fallback=0.1
        ),
        route_by="first",
        overflow="truncate",
        raw=False,
        merge=MergeSettings("ties", density=0.3, energy=0.9),
        max_tokens=7,
        sampling=Sampling(temperature=0.5, top_p=0.9, seed=3, top_k=5, min_p=0.1, repetition_penalty=1.2),
        stop=("a", "b"),
        choices=("yes", "no"),
        drafts=3,
    )
    assert (request.model, request.stream, request.usage) == ("task:snli", True, True)
    assert chat(adapters={"snli": 0.5, "cb": -1}).request.weights == {"snli": 0.5, "cb": -1}
    assert chat(max_completion_tokens=9, max_tokens=5).request.max_tokens == 9


def test_sampling_is_greedy_by_default() -> None:
    assert chat().request.sampling is None
    assert chat(seed=5).request.sampling is None
    assert chat(temperature=0).request.sampling == Sampling(0, 1.0)
    assert chat(top_p=0.5).request.sampling == Sampling(1.0, 0.5)
    assert chat(repetition_penalty=2).request.sampling == Sampling(0, repetition_penalty=2)
    assert chat(top_k=-1, temperature=0.5).request.sampling == Sampling(0.5, 1.0)
    assert chat(top_p=0, temperature=0.5).request.sampling == Sampling(0, 1.0)


def test_null_is_a_field_left_out() -> None:
    fields = ("max_tokens", "temperature", "stop", "seed", "stream", "stream_options", "tools", "n", "edgecompose")
    assert chat(**dict.fromkeys(fields)) == chat()
    assert chat(edgecompose={"method": None}) == chat()
    assert not chat(edgecompose={"explain": False}).explain


def test_forms_of_a_message() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "me"}]
    )
    assert request.prompts == ((Message("system", "be brief"), Message("user", "ab")),)
    assert text(prompt=["a", "b"]).prompts == ("a", "b")
    assert chat(stop="a").request.stop == ("a",)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, "'n' is 2, which is not supported"),
        ({"tools": [{"type": "function"}]}, "'tools' is .* not supported"),
        ({"logprobs": True}, "'logprobs' is true"),
        ({"response_format": {"type": "json_object"}}, "'response_format'"),
        ({"presence_penalty": 0.5}, "'presence_penalty'"),
        ({"max_tokens": 0}, "max_tokens is 0; expected 1 or more"),
        ({"max_tokens": -2}, "max_tokens is -2; expected 1 or more"),
        ({"max_tokens": "5"}, 'request.max_tokens is "5"; expected an integer'),
        ({"max_tokens": 1.5}, "is 1.5; expected an integer"),
        ({"temperature": "hot"}, 'is "hot"; expected a number'),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": True}, "is true; expected a number"),
        ({"stream": 1}, "expected true or false"),
        ({"stop": 5}, "'stop' is 5"),
        ({"stop": ["a"] * 17}, "17 strings; expected 16 at most"),
        ({"stop": "abcdef"}, "6 characters; expected 5 at most"),
        ({"stop": [""]}, "stop string is empty"),
        ({"adapters": ["snli"]}, "expected an object"),
        ({"adapters": {"snli": "1"}}, "expected a number"),
        ({"edgecompose": {"choices": ["a", "b", "c", "d"]}}, "4 choices"),
        ({"edgecompose": {"choices": ["a" * 21]}}, "1 choices of 21 characters"),
        ({"edgecompose": {"magic": 1}}, "unknown fields: magic"),
        ({"edgecompose": {"neighbours": 0}}, "neighbours is 0; expected 1 or more"),
        ({"edgecompose": {"method": "average"}}, "merge method 'average' is unknown"),
        ({"edgecompose": {"route_by": "all"}}, 'expected one of "last", "first"'),
        ({"edgecompose": {"exclude": "snli"}}, 'exclude is "snli"; expected a list'),
        ({"edgecompose": {"temperature": 0.1}}, "'temperature' in 'edgecompose' is called 'routing_temperature' now"),
        ({"edgecompose": {"reuse": False}}, "called 'prompt_cache' now"),
        ({"edgecompose": {"drafts": 9}}, "drafts is 9; expected an integer in 0 to 8"),
        ({"edgecompose": {"drafts": "many"}}, "drafts"),
        ({"edgecompose": {"method": "product", "density": 0.3}}, "density has no effect on method product"),
        ({"edgecompose": {"method": "linear", "energy": 0.3}}, "energy has no effect on method linear"),
        ({"adapters": {"snli": 1}, "edgecompose": {"neighbours": 3}}, "neighbours.* has no effect"),
        ({"adapters": {"snli": 1}, "edgecompose": {"exclude": ["cb"]}}, "exclude has no effect"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(EdgeComposeError, match=words):
        chat(**fields)


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(ApiError, match="expected a JSON object"):
        parse_call("chat", body, defaults=Defaults(), limits=LIMITS, context=1)
    with pytest.raises(ApiError, match="expected a JSON object"):
        parse_inputs(body, LIMITS)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": "x"}, "top_k"),
        ({"stop": [""]}, "stop"),
        ({"adapters": {"snli": "1"}}, "adapters.snli"),
        ({"edgecompose": {"nucleus": 7}}, "edgecompose.nucleus"),
        ({"edgecompose": {"magic": 1}}, "edgecompose.magic"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
    ids=str,
)
def test_an_error_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        chat(**fields)
    assert raised.value.param == param


def test_inputs_of_embeddings() -> None:
    assert parse_inputs({"input": "a", "model": "m"}, LIMITS) == (("a",), False)
    assert parse_inputs({"input": ["a", "b"], "encoding_format": "base64"}, LIMITS) == (("a", "b"), True)
    wrong: list[dict[str, Any]] = [{"input": []}, {"input": [1]}, {}, {"input": "a", "dimensions": 4}]
    for body in (*wrong, {"input": "a", "encoding_format": "x"}, {"input": ["a"] * 4}):
        with pytest.raises(ApiError):
            parse_inputs(body, LIMITS)
    with pytest.raises(ApiError, match="check_embedding_ctx_length=False"):
        parse_inputs({"input": [[1, 2]]}, LIMITS)
