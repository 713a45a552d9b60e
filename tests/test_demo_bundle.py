"""The real models on the real path: the demo bundle, as `make demo` builds it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgecompose import Composer, Request, Sampling, open_bundle
from edgecompose.bundle.files import verify
from edgecompose.formats.peft import write_peft_folder

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "models" / "demo"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BUNDLE / "manifest.json").is_file(), reason="models/demo is not built; run 'make bundle'"),
]

PROMPTS = {
    "yelp": "Customer review of a business: The staff were rude and my room was dirty. Never again.\n"
    "Would you call this customer's experience positive or negative?\nAnswer:",
    "mrpc": "First: The company said on Friday that it will close two of its plants.\n"
    "Second: Two plants will be closed, the company announced on Friday.\n"
    "Do both sentences mean the same? Say yes or no.\nAnswer:",
    "snli": "A photo is described as: A boy in a red shirt climbs a rock.\nIs it then true that: A child is outdoors.\n"
    "Say yes, maybe or no.\nAnswer:",
    "commonsense_qa": "Use common sense to answer.\n\nQuestion: Where would you put a plate after washing it?\n"
    "Options:\n- cupboard\n- garden\n- car\n- river\n- attic\nAnswer:",
}


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with open_bundle(BUNDLE, device="cpu") as opened:
        yield opened


def test_the_bundle_has_no_fault() -> None:
    assert verify(BUNDLE) == []


def test_the_base_is_close_to_float32(composer: Composer) -> None:
    distance = composer.bundle.manifest.base.distance
    assert distance is not None
    assert distance.kl <= 0.01
    assert distance.positions > 500


def test_the_base_alone_knows_the_capital_of_france(composer: Composer) -> None:
    answer = composer.run("The capital of France is", Request(weights={}, max_tokens=4, raw=True))
    assert "Paris" in answer.text
    assert answer.retrieval.weights == {}


@pytest.mark.parametrize("task", PROMPTS)
def test_a_prompt_is_routed_to_its_task(composer: Composer, task: str) -> None:
    retrieval = composer.retrieve(PROMPTS[task])
    assert next(iter(retrieval.weights)) == task
    assert sum(retrieval.weights.values()) == pytest.approx(1)
    assert len(retrieval.neighbours) == 100


def test_an_excluded_task_takes_no_part(composer: Composer) -> None:
    retrieval = composer.retrieve(PROMPTS["yelp"], Request(exclude=("yelp",)))
    assert "yelp" not in retrieval.weights
    assert "yelp" not in retrieval.distribution
    assert len(retrieval.neighbours) == 100


def test_the_adapter_of_a_task_changes_the_answer_as_it_should(composer: Composer) -> None:
    good = PROMPTS["yelp"].replace("The staff were rude and my room was dirty. Never again.", "Lovely. Great coffee!")
    assert composer.run(PROMPTS["yelp"], Request(max_tokens=8)).text == "negative"
    assert composer.run(good, Request(max_tokens=8)).text == "positive"


def test_choices_are_scored_by_likelihood(composer: Composer) -> None:
    answer = composer.run(PROMPTS["yelp"], Request(choices=("positive", "negative")))
    assert answer.choices is not None
    assert answer.text == max(answer.choices, key=lambda c: answer.choices[c] if answer.choices else 0.0)
    assert all(score < 0 for score in answer.choices.values())


def test_greedy_answers_repeat_and_samples_follow_their_seed(composer: Composer) -> None:
    runs = [composer.run("Name a colour.", Request(max_tokens=8)).text for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_blend_is_the_weighted_sum_of_its_adapters(composer: Composer) -> None:
    weights = {"yelp": 0.7, "snli": 0.4}
    blend = composer.compose("", Request(weights=weights)).merged.factors()["down_proj"]
    parts = {n: composer.compose("", Request(weights={n: 1.0})).merged.factors()["down_proj"] for n in weights}
    for layer in (0, 29):
        expected = sum(w * (parts[n][0][layer].T @ parts[n][1][layer]) for n, w in weights.items())
        result = blend[0][layer].T @ blend[1][layer]
        np.testing.assert_allclose(result, expected, atol=1e-5 * float(np.abs(expected).max()))


def test_a_blend_is_written_as_a_peft_folder(composer: Composer, tmp_path: Path) -> None:
    merged = composer.compose(PROMPTS["mrpc"]).merged
    paths = write_peft_folder(merged, tmp_path / "blend", composer.bundle.manifest.base)
    assert all(path.stat().st_size > 0 for path in paths)


def test_every_shipped_adapter_has_its_row_in_the_table_of_sources() -> None:
    table = (ROOT / "models" / "SOURCES.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    shipped = {path.stem for path in (ROOT / "models" / "adapters").glob("*.safetensors")}
    assert rows == shipped
    assert len(shipped) == 22


PASSAGE = (
    "The quick brown fox jumps over the lazy dog near the river bank. It was a bright cold day in April, and the "
    "clocks were striking thirteen. All happy families are alike; every unhappy family is unhappy in its own way."
)


@pytest.mark.parametrize(
    ("raw", "weights", "sampling"),
    [
        (True, {}, None),
        (False, {"yelp": 0.6, "snli": 0.4}, None),
        (True, {"yelp": 0.6, "snli": 0.4}, Sampling(temperature=0.7, seed=5)),
        (False, {}, Sampling(0, repetition_penalty=1.1)),
    ],
)
def test_an_answer_with_drafts_is_the_answer_without(
    composer: Composer, raw: bool, weights: dict[str, float], sampling: Sampling | None
) -> None:
    prompt = f"Repeat this text exactly, word for word:\n\n{PASSAGE}\n\nThe text once more:\n\n"
    request = Request(weights=weights, raw=raw, sampling=sampling, max_tokens=60)
    without, answer = (composer.run(prompt, dataclasses.replace(request, drafts=count)) for count in (0, 8))
    assert (answer.text, answer.generated_tokens) == (without.text, without.generated_tokens)
    assert without.drafted_tokens == 0 <= answer.accepted_tokens <= answer.drafted_tokens
