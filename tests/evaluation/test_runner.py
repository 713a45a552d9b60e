"""Variants on the tiny bundle: what each is, what is computed once, and going on after being killed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgecompose import Answer, Composer, MergeSettings, Request, Sampling, open_bundle
from edgecompose.errors import EvaluationError, MergeError
from edgecompose.evaluation.examples import EvalExample
from edgecompose.evaluation.runner import KINDS, Variant, adapters_of, evaluate, parse_variants
from edgecompose.merging.methods import METHODS, composition_digest
from edgecompose.settings import RetrievalSettings, override
from tests.evaluation.evaluations import EXAMPLES, REQUEST


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


def test_the_own_task_is_left_out(composer: Composer) -> None:
    result = evaluate(composer, EXAMPLES, parse_variants(["top1", "own", "retrieved"], REQUEST, exclude_own=True))
    for name in ("top1", "retrieved"):
        for outcome_of in result.results[name]:
            assert outcome_of.example.task not in outcome_of.weights
            assert outcome_of.top_task not in (None, outcome_of.example.task)
            assert not outcome_of.own_task
    assert all(dict(outcome_of.weights) == {outcome_of.example.task: 1.0} for outcome_of in result.results["own"])
    assert result.metrics("retrieved").routing.error is None


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
