"""Variants on the tiny bundle: what each is, what is computed once, and going on after being killed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecompose import Answer, Composer, MergeSettings, Request, Sampling, open_bundle
from edgecompose.errors import EvaluationError, MergeError
from edgecompose.evaluation.bootstrap import bootstrap_interval
from edgecompose.evaluation.examples import EvalExample
from edgecompose.evaluation.results import Evaluation, Result, routing
from edgecompose.evaluation.runner import KINDS, Variant, adapters_of, evaluate, parse_variants
from edgecompose.merging.methods import METHODS, composition_digest
from edgecompose.settings import RetrievalSettings, override
from edgecompose.timing import STAGES
from tests.fixtures_tiny import TASKS

REQUEST = Request(retrieval=RetrievalSettings(neighbours=9, nucleus=1.0), max_tokens=3)
EXAMPLES = [
    *(EvalExample(task, f"{prompt} now", "yes", ("yes", "no")) for task in TASKS for prompt in TASKS[task][:2]),
    EvalExample("animals", "which dog?", "a dog", aliases=("dog",)),
    EvalExample("birds", "does a hen fly?", "no", ("yes", "no", "a little")),
]


@pytest.fixture(scope="module")
def composer(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as opened:
        yield opened


@pytest.fixture
def runs(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """Every answer that the composer computes."""
    made: list[Answer] = []
    run = composer.run

    def counted(*arguments: Any, **options: Any) -> Answer:
        made.append(run(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(composer, "run", counted)
    return made


def without_times(evaluation: Evaluation) -> dict[str, list[Result]]:
    return {
        name: [dataclasses.replace(one, timings_ms={}) for one in result] for name, result in evaluation.results.items()
    }


def test_variants_do_what_is_done_by_hand(composer: Composer) -> None:
    result = evaluate(composer, EXAMPLES, parse_variants([*KINDS, "core_ties"], REQUEST))
    assert result.main == "retrieved"
    for example in EXAMPLES:
        retrieval = composer.retrieve(example.prompt, REQUEST)
        expected: dict[str, dict[str, float]] = {
            "base": {},
            "own": {example.task: 1.0},
            "top1": {next(iter(retrieval.distribution)): 1.0},
            "uniform": {task: 1 / len(retrieval.nucleus) for task in retrieval.nucleus},
            "retrieved": dict(retrieval.weights),
        }
        for kind in KINDS:
            outcome_of = [one for one in result.results[kind] if one.example == example]
            if kind == "own" and example.task == "birds":
                assert outcome_of == []
                continue
            request = dataclasses.replace(REQUEST, weights=expected[kind], choices=example.choices or ())
            answer = composer.run(example.prompt, request)
            assert dict(outcome_of[0].weights) == pytest.approx(expected[kind])
            assert outcome_of[0].answer == (
                answer.text if example.choices else answer.text.strip().split("\n")[0].strip()
            )
            assert outcome_of[0].right == example.is_right(outcome_of[0].answer)
            routed = kind in ("top1", "uniform", "retrieved")
            assert outcome_of[0].top_task == (next(iter(retrieval.distribution)) if routed else None)
            assert outcome_of[0].top_share == (max(retrieval.distribution.values()) if routed else None)
            assert outcome_of[0].similarity == (retrieval.neighbours[0].similarity if routed else None)


def test_a_variant_has_the_settings_of_the_bundle_by_default(composer: Composer) -> None:
    example = EXAMPLES[0]
    (result,) = evaluate(composer, [example], [Variant("x", "retrieved")]).results["x"]
    answer = composer.run(example.prompt, Request(choices=example.choices or ()))
    assert (dict(result.weights), result.answer) == (dict(answer.retrieval.weights), answer.text)


def test_the_key_of_a_cached_answer_is_the_blend_of_the_composer(composer: Composer, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    variants = parse_variants(["base", "own", "retrieved", "core_ties"], REQUEST)
    for example in EXAMPLES[:4]:
        result = evaluate(composer, [example], variants, answer_cache=path)
        remaining = {json.loads(line)["key"]["composition"] for line in path.read_text().splitlines()}
        for variant in variants:
            (outcome_of,) = result.results[variant.name]
            request = dataclasses.replace(variant.request, weights=outcome_of.weights)
            assert composer.compose(example.prompt, request).merged.digest in remaining


def test_the_same_blend_is_computed_once(composer: Composer, runs: list[Answer]) -> None:
    sure = dataclasses.replace(
        REQUEST, retrieval=RetrievalSettings(neighbours=1)
    )  # one neighbour: one task, so all four blends are one
    variants = [Variant(kind, kind, sure) for kind in ("top1", "uniform", "retrieved")]
    evaluate(composer, EXAMPLES, variants)
    assert len(runs) == len(EXAMPLES)
    runs.clear()
    empty = [
        Variant(name, "base", request)
        for name, request in (
            ("one", sure),
            ("two", dataclasses.replace(sure, merge=MergeSettings("ties", norm_guard=True))),
            ("longer", dataclasses.replace(sure, max_tokens=5)),
            ("raw", dataclasses.replace(sure, raw=True)),
        )
    ]
    evaluate(composer, EXAMPLES, empty)
    free = sum(example.choices is None for example in EXAMPLES)
    assert len(runs) == 2 * len(EXAMPLES) + free  # raw is another prompt, a longer answer matters to free text only


def test_a_killed_evaluation_goes_on(composer: Composer, runs: list[Answer], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    variants = parse_variants(["base", "own", "retrieved"], REQUEST)
    first = evaluate(composer, EXAMPLES, variants, answer_cache=path)
    whole, computed = path.read_bytes(), len(runs)
    lines = whole.splitlines(keepends=True)
    assert len(lines) == computed
    timings = first.metrics("base").timings_ms
    for cut in (0, 1, len(lines[0]) - 1, len(lines[0]) + 40, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        runs.clear()
        again = evaluate(composer, EXAMPLES, variants, answer_cache=path)
        assert without_times(again) == without_times(first)
        assert len(runs) == computed - whole[:cut].count(b"\n")
        assert path.read_bytes().count(b"\n") == computed
    assert again.metrics("base").timings_ms == pytest.approx(timings, abs=1e-3)  # read from the file, not measured


def test_cached_answers_of_another_base_are_not_used(
    composer: Composer, bundle_copy: Path, runs: list[Answer], tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    variants = parse_variants(["base"], REQUEST)
    evaluate(composer, EXAMPLES, variants, answer_cache=path)
    manifest = bundle_copy / "manifest.json"
    result = json.loads(manifest.read_text(encoding="utf-8"))
    result["base"]["precision"] = "other"
    manifest.write_text(json.dumps(result), encoding="utf-8")
    with open_bundle(bundle_copy, device="cpu") as other:
        evaluate(other, EXAMPLES, variants, answer_cache=path)
    assert path.read_bytes().count(b"\n") == 2 * len(EXAMPLES)
    runs.clear()
    evaluate(composer, EXAMPLES, variants, answer_cache=path)
    assert not runs


@pytest.mark.parametrize("content", [b"notes\n", b"notes", b"{}\n", b'{"key": {"base": 1}}\n', b"\xff\n", b"[" * 99999])
def test_a_file_that_holds_no_answers_is_left_alone(composer: Composer, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"mine.txt:1 is no answer of an evaluation"):
        evaluate(composer, EXAMPLES, parse_variants(["base"], REQUEST), answer_cache=path)
    assert path.read_bytes() == content


def test_the_own_task_is_left_out(composer: Composer) -> None:
    result = evaluate(composer, EXAMPLES, parse_variants(["top1", "own", "retrieved"], REQUEST, exclude_own=True))
    for name in ("top1", "retrieved"):
        for outcome_of in result.results[name]:
            assert outcome_of.example.task not in outcome_of.weights
            assert outcome_of.top_task not in (None, outcome_of.example.task)
            assert not outcome_of.own_task
    assert all(dict(outcome_of.weights) == {outcome_of.example.task: 1.0} for outcome_of in result.results["own"])
    assert result.metrics("retrieved").routing.error is None


def test_standings_sum_up(bundle: Path) -> None:
    ticks: list[int] = []
    variants = parse_variants(["own", "base", "retrieved"], REQUEST)
    with open_bundle(bundle, device="cpu") as fresh:  # which has not yet embedded these prompts
        result = evaluate(fresh, EXAMPLES, variants, advance=ticks.append)
    assert ticks == [1] * (3 * len(EXAMPLES))
    metrics = result.metrics("retrieved")
    assert {task: score.n for task, score in metrics.tasks.items()} == {
        "animals": 3,
        "birds": 1,
        "colours": 2,
        "numbers": 2,
    }
    assert metrics.mean == pytest.approx(sum(score.accuracy for score in metrics.tasks.values()) / 4)
    animals = [outcome_of.right for outcome_of in result.results["retrieved"] if outcome_of.example.task == "animals"]
    assert metrics.tasks["animals"].accuracy == sum(animals) / 3
    assert metrics.tasks["animals"].ci95 == bootstrap_interval(np.array(animals))
    assert tuple(metrics.timings_ms) == STAGES
    assert metrics.timings_ms["embed"] > 0
    assert metrics.timings_ms["total"] >= metrics.timings_ms["embed"] + metrics.timings_ms["prefill"]
    assert result.metrics("base").timings_ms["embed"] == 0
    assert result.metrics("base").weights["birds"] == {}
    assert sum(metrics.weights["animals"].values()) == pytest.approx(1)
    assert sum(sum(row.values()) for row in metrics.routing.confusion.values()) == len(EXAMPLES)
    assert sum(b.n for b in metrics.routing.reliability) == len(EXAMPLES) - 1  # no bundle has birds
    assert set(result.metrics("own").tasks) == set(TASKS)
    against = result.against("own")
    assert against is not None
    assert len(against.by_task) == 3
    summary = result.summary()
    assert summary.main == "retrieved"
    assert summary.metrics == {name: result.metrics(name) for name in ("own", "base", "retrieved")}
    assert summary.against == {name: result.against(name) for name in ("own", "base")}
    assert result.misses(99) == [outcome_of for outcome_of in result.results["retrieved"] if not outcome_of.right]
    assert len(result.misses(1)) <= 1


def test_reliability_is_counted_in_bins() -> None:
    def outcome_of(share: float, right: bool) -> Result:
        example = EvalExample("t", "p", "a")
        return Result(example, True, "a", {}, "t" if right else "u", share, 0.5, True, {})

    result = routing([outcome_of(1.0, True), outcome_of(0.95, False), outcome_of(0.91, True), outcome_of(0.3, False)])
    assert [b.n for b in result.reliability] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 3]
    assert result.reliability[9].share == pytest.approx(0.9533, abs=1e-4)
    assert result.reliability[9].right == pytest.approx(2 / 3)
    assert result.error == pytest.approx((3 * abs(0.95333 - 2 / 3) + 0.3) / 4, abs=1e-4)
    assert result.confusion == {"t": {"t": 2, "u": 2}}
    assert routing([]).error is None


def test_empty_routes_are_the_base_alone(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    retrieve = composer.retrieve

    def nothing(prompt: str, request: Request, **options: Any) -> Any:
        return dataclasses.replace(retrieve(prompt, request, **options), nucleus={}, distribution={}, weights={})

    monkeypatch.setattr(composer, "retrieve", nothing)
    result = evaluate(composer, EXAMPLES[:1], [Variant(kind, kind, REQUEST) for kind in ("top1", "uniform")])
    for (outcome_of,) in result.results.values():
        assert (outcome_of.weights, outcome_of.top_task) == ({}, None)


def test_adapters_of_a_task(composer: Composer) -> None:
    manifest = composer.bundle.manifest
    assert adapters_of(manifest, "animals") == {"animals": 1.0}
    assert adapters_of(manifest, "birds") == {}


def test_names_are_kinds_or_methods() -> None:
    result = parse_variants([*KINDS, *METHODS], Request(merge=MergeSettings("svd", energy=0.9, density=0.3)))
    assert [(c.name, c.kind) for c in result[:5]] == [(kind, kind) for kind in KINDS]
    for variant in result[5:]:
        assert variant.kind == "retrieved"
        assert override(MergeSettings(), variant.request.merge, MergeError) == MergeSettings(
            variant.name, energy=0.9, density=0.3
        )
    with pytest.raises(EvaluationError, match="no variant is called 'best'"):
        parse_variants(["best"], Request())


def test_what_cannot_be_evaluated_is_refused(composer: Composer) -> None:
    base = Variant("base", "base")
    with pytest.raises(EvaluationError, match="no example remains for 'base'; expected at least one"):
        evaluate(composer, [], [base])
    with pytest.raises(EvaluationError, match="no example remains for 'own'; expected examples of the bundle's tasks"):
        evaluate(composer, EXAMPLES[-1:], [base, Variant("own", "own")])
    for variants in ([], [base, base]):
        with pytest.raises(EvaluationError, match="expected at least one, each once"):
            evaluate(composer, EXAMPLES, variants)
    long = EvalExample("animals", "cat " * 600, "yes", ("yes", "no"))
    with pytest.raises(EvaluationError, match=r"task 'animals' cannot be answered: .* context of 512.*begins cat cat"):
        evaluate(composer, [long], [base])
    for request in (Request(sampling=Sampling()), Request(choices=("a", "b")), Request(weights={})):
        with pytest.raises(EvaluationError, match="variant 'x' "):
            Variant("x", "base", request)
    with pytest.raises(EvaluationError, match="of kind 'other'"):
        Variant("x", "other")  # type: ignore[arg-type]


def test_a_blends_name_needs_no_merge(composer: Composer) -> None:
    """The digests that the manifest lists are those that adapters carry."""
    manifest = composer.bundle.manifest
    for name, spec in manifest.adapters.items():
        digest = composition_digest({name: manifest.files[spec.file].sha256}, {name: 1.0}, composer.default_merge)
        assert digest == composer.compose("x", Request(weights={name: 1.0})).merged.digest


def test_a_fixed_blend_is_the_same_for_every_example(composer: Composer) -> None:
    weights = {"numbers": 0.75, "colours": 0.5}
    result = evaluate(composer, EXAMPLES[:2], [Variant("by hand", "fixed", Request(weights=weights))])
    for outcome_of in result.results["by hand"]:
        answer = composer.run(
            outcome_of.example.prompt, Request(weights=weights, choices=outcome_of.example.choices or ())
        )
        assert (dict(outcome_of.weights), outcome_of.top_task) == (weights, None)
        assert outcome_of.example.choices is None or outcome_of.answer == answer.text
    with pytest.raises(EvaluationError, match="only 'fixed' takes weights"):
        Variant("x", "fixed")
