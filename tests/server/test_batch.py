"""Files of calls in the form of OpenAI's batch API: answered in order, gone on with after a stop, never damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Composer, Request, open_bundle
from edgecompose.errors import ApiError
from edgecompose.server.batch import answer_calls, read_calls
from edgecompose.server.endpoints import BY_PATH
from tests.fixtures_tiny import TASKS


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


def chat(name: str, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 6, **fields}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


CALLS = [
    chat("one", TASKS["animals"][0]),
    chat("two", TASKS["numbers"][0], adapters={"animals": 0.5}),
    {"custom_id": "three", "url": "/v1/completions", "body": {"prompt": ["a dog", "two and two"], "max_tokens": 4}},
    chat("four", "no such", model="gpt-4"),
    chat("five", "nobody reads this", stream=True),
    chat("six", "the cat " * 4000),
]


def write(path: Path, calls: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(call) + "\n" for call in calls) + "\n", encoding="utf-8")
    return path


def results(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_call_has_its_result_in_order(opened: Composer, tmp_path: Path) -> None:
    calls, output = read_calls(write(tmp_path / "calls.jsonl", CALLS)), tmp_path / "out" / "results.jsonl"
    steps: list[float] = []
    assert answer_calls(opened, calls, output, max_tokens=100, advance=steps.append) == (6, 3)
    result = results(output)
    assert [r["custom_id"] for r in result] == [c["custom_id"] for c in CALLS]
    assert [r["response"]["status_code"] for r in result] == [200, 200, 200, 404, 400, 400]
    assert [r["error"] is None for r in result] == [True] * 3 + [False] * 3
    assert "'stream' is true" in result[4]["error"]["message"]
    assert result[5]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    one = opened.run(TASKS["animals"][0], Request(max_tokens=6))
    assert result[0]["response"]["body"]["choices"][0]["message"]["content"] == one.text
    assert result[0]["response"]["body"]["edgecompose"]["composition"] == one.composition
    texts = [c["text"] for c in result[2]["response"]["body"]["choices"]]
    assert texts == [opened.run(p, Request(max_tokens=4, raw=True)).text for p in ("a dog", "two and two")]
    assert sum(steps) == 6


def test_every_endpoint_of_the_table_is_answered(opened: Composer, tmp_path: Path) -> None:
    bodies = {
        "/v1/embeddings": {"model": "any", "input": [TASKS["animals"][0], "hello"]},
        "/v1/compose": {"messages": [{"role": "user", "content": TASKS["animals"][0]}]},
        "/v1/chat/completions": CALLS[0]["body"],
        "/v1/completions": {"prompt": "a dog", "max_tokens": 2},
    }
    assert set(bodies) == set(BY_PATH)
    calls = [{"custom_id": url, "url": url, "body": body} for url, body in bodies.items()]
    calls.append({"custom_id": "refused", "url": "/v1/embeddings", "body": {"input": 3}})
    output = tmp_path / "results.jsonl"
    assert answer_calls(opened, read_calls(write(tmp_path / "calls.jsonl", calls)), output, max_tokens=100) == (5, 1)
    answered = {line["custom_id"]: line["response"]["body"] for line in results(output)}
    vector, _ = opened.embed("hello")
    assert answered["/v1/embeddings"]["data"][1]["embedding"] == pytest.approx(vector.tolist())
    assert answered["/v1/compose"]["composition"] == opened.compose(TASKS["animals"][0]).merged.digest
    assert answered["refused"]["error"]["param"] == "input"
    assert answer_calls(opened, read_calls(tmp_path / "calls.jsonl"), output, max_tokens=100) == (0, 0)


@pytest.mark.parametrize("torn", [b"", b"{", b'{"id": "cmpl-9", "custom_id": "thr'], ids=["whole", "begun", "torn"])
def test_a_stopped_run_goes_on(opened: Composer, tmp_path: Path, torn: bytes) -> None:
    calls, output = read_calls(write(tmp_path / "calls.jsonl", CALLS)), tmp_path / "results.jsonl"
    answer_calls(opened, calls[:2], output, max_tokens=100)
    before = output.read_bytes()
    output.write_bytes(before + torn)
    assert answer_calls(opened, calls, output, max_tokens=100) == (4, 3)
    assert output.read_bytes().startswith(before)
    assert [r["custom_id"] for r in results(output)] == [c["custom_id"] for c in CALLS]
    assert answer_calls(opened, calls, output, max_tokens=100) == (0, 0)


@pytest.mark.parametrize("content", [b"my notes\n", b'{"a": 1}\n', b"[]\n", b"notes without an end"])
def test_another_file_is_left_alone(opened: Composer, tmp_path: Path, content: bytes) -> None:
    output = tmp_path / "results.jsonl"
    output.write_bytes(content)
    with pytest.raises(ApiError, match="no result of a batch"):
        answer_calls(opened, read_calls(write(tmp_path / "calls.jsonl", CALLS)), output, max_tokens=100)
    assert output.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no call"),
        ('{"custom_id": "x"}', "is no call"),
        ("\x00", "is not JSON"),
        ('{"custom_id": 3, "url": "/v1/completions", "body": {}}', "is no call"),
        ('{"custom_id": "x", "url": "/v1/models", "body": {}}', "use POST and /v1/chat/completions"),
        ('{"custom_id": "x", "method": "GET", "url": "/v1/completions", "body": {}}', "is GET"),
        (json.dumps(CALLS[0]), "of another line"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "calls.jsonl", CALLS[:1])
    path.write_text(path.read_text() + line + "\n", encoding="utf-8")
    with pytest.raises(ApiError, match=message) as caught:
        read_calls(path)
    assert "calls.jsonl:3" in str(caught.value)
