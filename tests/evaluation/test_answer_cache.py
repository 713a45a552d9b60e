"""The answer cache: a killed evaluation is resumed, and other files are left alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgecompose import Answer, Composer, open_bundle
from edgecompose.errors import EvaluationError
from edgecompose.evaluation.results import Evaluation, Result
from edgecompose.evaluation.runner import evaluate, parse_variants
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


def without_times(evaluation: Evaluation) -> dict[str, list[Result]]:
    return {
        name: [dataclasses.replace(one, timings_ms={}) for one in result] for name, result in evaluation.results.items()
    }


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
