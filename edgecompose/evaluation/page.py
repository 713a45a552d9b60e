"""A folder that tells of an evaluation: one page that is complete in itself, its charts apart, and the figures."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from edgecompose.bundle.atomic import new_files
from edgecompose.evaluation.charts import Chart, colours, draw_charts
from edgecompose.evaluation.results import Evaluation, Result, Summary
from edgecompose.evaluation.table import interval, percent, signed
from edgecompose.timing import STAGES

_MISSES = 20
#: Characters of a prompt that are shown of its start and of its end, where the question is.
_HEAD, _TAIL = 400, 200
_SHORT = 120
_CAPTIONS = {
    "accuracy": "A line is an interval of 95 %, tasks are in the order of the main variant's accuracy.",
    "weights": "Mean over a task's examples; below 2 left blank. A frame marks an adapter of the task's own name.",
    "confusion": "The task with the largest share of the neighbours' weight; below 2 left blank.",
    "reliability": "Examples of the bundle's own tasks, in ten bins of the top task's share, with their counts.",
}


def write_report(evaluation: Evaluation, summary: Summary, result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `index.html`, every chart as SVG and PNG, and `result.json`, over older ones if need be.

    Args:
        summary: that of the evaluation.
        result: the value of `table.evaluation_json`.

    Returns:
        the files, the page first.

    Raises:
        EvaluationError: matplotlib is not installed.
        InUse: another process is writing to the folder.
        OSError: a file cannot be written; the older report stays.
    """
    charts = draw_charts(summary)
    files: dict[str, bytes] = {"index.html": page(evaluation, result, charts, colours(summary)).encode("utf-8")}
    for chart in charts:
        files |= {f"{chart.name}.svg": chart.svg.encode("utf-8"), f"{chart.name}.png": chart.png}
    files["result.json"] = json.dumps(result, indent=1, ensure_ascii=False).encode("utf-8") + b"\n"
    with new_files(folder, last="index.html") as work:
        for name, content in files.items():
            (work / name).write_bytes(content)
    return [folder / name for name in files]


def page(evaluation: Evaluation, result: Mapping[str, Any], charts: Sequence[Chart], palette: Mapping[str, str]) -> str:
    """The report as HTML, `palette` being a colour for each variant; whatever comes from examples is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode("utf-8")).decode("ascii")
    counts = {len(metrics["tasks"]) for metrics in result["variants"].values()}
    return environment.get_template("report.html").render(
        main=evaluation.main,
        result=result,
        settings=result["settings"],
        charts=charts,
        captions=_CAPTIONS,
        colours=palette,
        percent=percent,
        interval=interval,
        signed=signed,
        stages=STAGES,
        uneven=len(counts) > 1,
        rows=list(_rows(result)),
        misses=list(map(_miss, evaluation.misses(_MISSES))),
        described=list(_described(result["settings"])),
    )


def shortened(text: str, head: int = _HEAD, tail: int = _TAIL) -> str:
    """A long text without its middle."""
    return text if len(text) <= head + tail + 40 else f"{text[:head]} [...] {text[len(text) - tail :]}".rstrip()


def _rows(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    variants = result["variants"].values()
    for task in sorted(set().union(*(metrics["tasks"] for metrics in variants))):
        scores = [metrics["tasks"].get(task) for metrics in variants]
        had = [score for score in scores if score]
        yield {"task": task, "n": max(s["n"] for s in had), "scores": scores, "best": max(s["accuracy"] for s in had)}


def _miss(result: Result) -> dict[str, str]:
    example = result.example
    weights = ", ".join(f"{name} {weight:.3f}" for name, weight in result.weights.items())
    return {
        "task": example.task,
        "expected": shortened(example.answer, _SHORT, 0),
        "got": shortened(result.answer, _SHORT, 0),
        "prompt": shortened(example.prompt),
        "weights": weights or "none",
        "choices": shortened("; ".join(example.choices or ())),
    }


def _described(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and name == "variants":
            yield from ((f"variant {n}", _words(variant)) for n, variant in value.items())
        else:
            yield name.replace("_", " "), _words(value)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_words(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no", None: "all"}[value] if value is None or isinstance(value, bool) else str(value)
