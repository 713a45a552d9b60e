"""The first thing that people type, on a real base: it gets an answer in the chat template, whatever answers it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgecompose import Composer, Message, Request, open_bundle
from tests.openers import OPENERS, begins_an_answer

DEMO = Path(__file__).parents[1] / "models" / "demo"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DEMO / "manifest.json").is_file(), reason="the demo bundle is not built: run `make bundle`"
    ),
]
#: Prompts of tasks that the demo has adapters for.
TASKS = (
    "Customer review of a business: The staff were rude and my room was dirty.\n"
    "Would you call this customer's experience positive or negative?\nAnswer:",
    "First: The company said on Friday that it will close two of its factories next year.\n"
    "Second: Two factories will be closed next year, the company announced on Friday.\n"
    "Do both sentences mean the same? Say yes or no.\nAnswer:",
)


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with open_bundle(DEMO, device="cpu") as opened:
        yield opened


def test_there_are_forty() -> None:
    assert len(set(OPENERS)) == 40


@pytest.mark.parametrize("text", OPENERS)
def test_an_opener_is_answered_by_the_base_in_its_template(composer: Composer, text: str) -> None:
    answer = composer.run([Message("user", text)], Request(max_tokens=12, prompt_cache=True))
    assert (answer.prompt_form, dict(answer.retrieval.weights)) == ("chat", {})
    assert begins_an_answer(answer.text), answer.text
    base = composer.run([Message("user", text)], Request(weights={}, max_tokens=12))
    assert (base.text, base.prompt_form) == (answer.text, "chat"), "the base alone is asked in the same form"
    task = composer.run([Message("user", text)], Request(weights={"yelp": 1.0}, max_tokens=2))
    assert task.prompt_form == "chat"


@pytest.mark.parametrize("prompt", TASKS)
def test_a_prompt_of_a_task_is_sent_as_its_adapters_were_trained(composer: Composer, prompt: str) -> None:
    for weights in (None, {}, {"yelp": 1.0}):
        assert composer.run(prompt, Request(weights=weights, max_tokens=2)).prompt_form == "raw"
    assert composer.run(prompt, Request(max_tokens=2)).retrieval.weights


@pytest.mark.parametrize("text", (OPENERS[13], TASKS[0]))
def test_the_same_call_has_the_same_answer_with_and_without_the_prompt_cache(composer: Composer, text: str) -> None:
    talk = [Message("user", text)]
    for _ in range(2):
        answers = [composer.run(talk, Request(max_tokens=16, prompt_cache=cache == "c")).text for cache in "-cc"]
        assert len(set(answers)) == 1
        while composer.model.read_ahead():
            pass
        talk += [Message("assistant", answers[0]), Message("user", "Tell me more about that, please. " * 4)]
