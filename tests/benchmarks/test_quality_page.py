"""The page of results is written out of what was measured."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import reworded
from benchmarks.quality_page import page, routing
from edgecompose.evaluation.examples import EvalExample

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_every_figure_of_a_result_is_on_the_page() -> None:
    paths = sorted(RESULTS.glob("*-quality-*-unseen.json"))
    text = page(paths)
    for path in paths:
        for result in json.loads(path.read_text(encoding="utf-8"))["settings"].values():
            for name, actual in result["variants"].items():
                assert f"{name} |" in text or f"**{name}** |" in text
                assert f"| {100 * actual['mean_accuracy']:.1f} |" in text
            for task in result["variants"][result["main"]]["tasks"]:
                assert f"| {task} |" in text


def test_routing_says_how_often_the_own_task_is_on_top() -> None:
    (line,) = routing({"a": {"a": 3, "b": 1}, "b": {"b": 4}})
    assert "87.5 %" in line and "a 75.0" in line and "b " not in line.split("below 90")[1]
    (line,) = routing({"rte": {"rte": 2, "wnli": 1, "yelp": 1}})
    assert "own: 50.0 %" in line and "twin: 75.0 %" in line
    assert routing({"a": {"b": 2}}) == []  # left out or unseen: it cannot be its own


def test_reworded_examples_keep_their_answers() -> None:
    prompt = "A photo is described as: A dog runs.\nIs it then true that: A cat sits.\nSay yes, maybe or no.\nAnswer:"
    examples = [EvalExample("snli", prompt, "no", ("yes", "maybe", "no"))] * 2
    first, second = reworded(examples)
    assert first.prompt != second.prompt
    for result in (first, second):
        assert result.prompt != prompt and "A dog runs." in result.prompt and "A cat sits." in result.prompt
        assert (result.answer, result.choices) == ("no", ("yes", "maybe", "no"))
    with pytest.raises(ValueError, match="not a prompt of snli"):
        list(reworded([EvalExample("snli", "else", "no")]))
