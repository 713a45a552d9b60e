"""A prompt through retrieval, merging and generation, on the tiny bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgecompose import Composer, EdgeComposeError, MergeSettings, Request, Sampling, open_bundle
from edgecompose.errors import UnknownAdapter
from tests.recipes import ALONE, PROMPT


@pytest.fixture(scope="module")
def composer(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as opened:
        yield opened


def test_a_whole_answer(composer: Composer) -> None:
    chunks: list[str] = []
    answer = composer.run(PROMPT, on_text=chunks.append)
    assert "".join(chunks) == answer.text
    assert 0 <= answer.generated_tokens <= 6
    assert answer.prompt_tokens > len(PROMPT) / 2
    assert len(answer.retrieval.neighbours) == 4
    assert sum(answer.retrieval.weights.values()) == pytest.approx(1)
    assert sum(answer.retrieval.distribution.values()) == pytest.approx(1)
    assert answer == dataclasses.replace(composer.run(PROMPT), timings_ms=answer.timings_ms)


def test_the_blend_changes_the_logits(composer: Composer) -> None:
    choices = ("yes", "no", "maybe so")
    scores = [
        composer.run(PROMPT, dataclasses.replace(request, choices=choices)).choices
        for request in (ALONE, Request(weights={"animals": 1.0}), Request(weights={"animals": -1.0}), Request())
    ]
    values = [tuple(s.values()) for s in scores if s is not None]
    assert len(set(values)) == 4


def test_choices_are_ranked(composer: Composer) -> None:
    answer = composer.run(PROMPT, Request(choices=("yes", "no", "maybe so")))
    assert answer.choices is not None
    assert list(answer.choices) == ["yes", "no", "maybe so"]
    assert all(score < 0 for score in answer.choices.values())
    assert answer.text == max(answer.choices, key=answer.choices.__getitem__)
    turned = composer.run(PROMPT, Request(choices=("maybe so", "no", "yes")))
    assert turned.choices == pytest.approx(answer.choices, abs=1e-5)
    with pytest.raises(EdgeComposeError, match="appears twice"):
        composer.run(PROMPT, Request(choices=("yes", "yes")))


def test_weights_by_hand_skip_retrieval(composer: Composer) -> None:
    answer = composer.run("", Request(weights={"numbers": 0.5, "colours": -0.25}))
    assert answer.retrieval.neighbours == ()
    assert answer.retrieval.weights == {"numbers": 0.5, "colours": -0.25}
    assert answer.timings_ms["embed"] == 0
    other = composer.run("", Request(weights={"colours": -0.25, "numbers": 0.5}))
    assert (other.composition, other.text) == (answer.composition, answer.text)
    with pytest.raises(UnknownAdapter, match="'absent' is not in the bundle"):
        composer.run(PROMPT, Request(weights={"absent": 1.0}))


def test_zero_weight_is_the_base_alone(composer: Composer) -> None:
    choices = ("one", "two")
    zero = composer.run(PROMPT, Request(weights={"animals": 0.0}, choices=choices)).choices
    assert zero == pytest.approx(composer.run(PROMPT, Request(weights={}, choices=choices)).choices, abs=1e-5)


def test_a_seed_decides_what_is_drawn(composer: Composer) -> None:
    def draw(seed: int) -> str:
        return composer.run(PROMPT, Request(sampling=Sampling(5.0, 1.0, seed), max_tokens=12)).text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
def test_factorwise_methods_need_one_rank(composer: Composer, method: str) -> None:
    settings = MergeSettings(method)
    assert composer.run(PROMPT, Request(weights={"animals": 1.0}, merge=settings)).settings == settings
    with pytest.raises(EdgeComposeError, match=r"has ranks \[2, 4\]"):
        composer.run(PROMPT, Request(weights={"animals": 0.5, "numbers": 0.5}, merge=settings))


def test_a_closed_composer_loads_again(bundle: Path) -> None:
    opened = open_bundle(bundle, device="cpu")
    opened.warm_up()
    first = opened.run(PROMPT).text
    opened.close()
    assert opened.run(PROMPT).text == first
