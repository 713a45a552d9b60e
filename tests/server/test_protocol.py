"""Calls in the form of the OpenAI API: what they mean, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from edgecompose.bundle.manifest import Defaults
from edgecompose.errors import ApiError, EdgeComposeError
from edgecompose.generation.messages import Message
from edgecompose.request import Request
from edgecompose.server.protocol import ApiCall, parse_call, parse_inputs
from edgecompose.settings import MergeSettings, RetrievalSettings, Sampling

TALK = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ApiCall:
    defaults = Defaults(merge=MergeSettings("svd", energy=0.9), max_tokens=10)
    return parse_call("chat", {"messages": TALK, **fields}, defaults=defaults, max_tokens=100)


def text(**fields: Any) -> ApiCall:
    return parse_call("text", {"prompt": "x", **fields}, defaults=Defaults(max_tokens=10), max_tokens=100)


def test_a_bare_call_takes_the_defaults() -> None:
    request = chat()
    assert request.prompts == ((Message("user", "hello"),),)
    assert request.request == Request(max_tokens=10, prompt_cache=True)
    assert (request.model, request.stream, request.usage) == ("auto", False, False)
    assert text().request == Request(max_tokens=10, raw=True)


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


def test_null_is_a_field_left_out() -> None:
    fields = ("max_tokens", "temperature", "stop", "seed", "stream", "stream_options", "tools", "n", "edgecompose")
    assert chat(**dict.fromkeys(fields)) == chat()
    assert chat(edgecompose={"method": None}) == chat()


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
        ({"messages": []}, "'messages' is missing or empty"),
        ({"messages": "hello"}, "'messages' is missing or empty"),
        ({"messages": ["hello"]}, "a message is 'hello'; expected a JSON object"),
        ({"messages": [{"role": "user", "content": None}]}, "content is NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "only text is read"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "calls a tool"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role 'wizard'"),
        ({"n": 2}, "'n' is 2, which is not supported"),
        ({"tools": [{"type": "function"}]}, "'tools' is .* not supported"),
        ({"logprobs": True}, "'logprobs' is True"),
        ({"response_format": {"type": "json_object"}}, "'response_format'"),
        ({"presence_penalty": 0.5}, "'presence_penalty'"),
        ({"max_tokens": 0}, "expected 1 to 100"),
        ({"max_tokens": 101}, "expected 1 to 100"),
        ({"max_tokens": "5"}, "request.max_tokens is '5'; expected int"),
        ({"max_tokens": 1.5}, "expected int"),
        ({"temperature": "hot"}, "expected float"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": True}, "expected float"),
        ({"stream": 1}, "expected bool"),
        ({"stop": 5}, "'stop' is 5"),
        ({"stop": ["a"] * 17}, "expected 16 at most"),
        ({"stop": [""]}, "stop string is empty"),
        ({"adapters": ["snli"]}, "expected dict"),
        ({"adapters": {"snli": "1"}}, "expected float"),
        ({"edgecompose": {"magic": 1}}, "unknown fields: magic"),
        ({"edgecompose": {"neighbours": 0}}, "neighbours is 0; expected 1 or more"),
        ({"edgecompose": {"method": "average"}}, "merge method 'average' is unknown"),
        ({"edgecompose": {"route_by": "all"}}, "expected one of 'last', 'first'"),
        ({"edgecompose": {"exclude": "snli"}}, "exclude is 'snli'; expected tuple"),
        ({"edgecompose": {"temperature": 0.1}}, "'temperature' in 'edgecompose' is called 'routing_temperature' now"),
        ({"edgecompose": {"reuse": False}}, "called 'prompt_cache' now"),
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
        parse_call("chat", body, defaults=Defaults(), max_tokens=1)
    with pytest.raises(ApiError, match="expected a JSON object"):
        parse_inputs(body)


def test_inputs_of_embeddings() -> None:
    assert parse_inputs({"input": "a", "model": "m"}) == (("a",), False)
    assert parse_inputs({"input": ["a", "b"], "encoding_format": "base64"}) == (("a", "b"), True)
    wrong: list[dict[str, Any]] = [{"input": []}, {"input": [1]}, {}, {"input": "a", "dimensions": 4}]
    for body in (*wrong, {"input": "a", "encoding_format": "x"}):
        with pytest.raises(ApiError):
            parse_inputs(body)
