"""An evaluation as a JSON value and as a table; prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgecompose.bundle.manifest import Manifest
from edgecompose.composer import merge_settings
from edgecompose.engine.device import Device
from edgecompose.evaluation.examples import RESAMPLES, Interval, PairedDifference
from edgecompose.evaluation.results import Comparison, Routing, Standing, Summary
from edgecompose.evaluation.runner import MAX_TOKENS, Contender
from edgecompose.request import WEIGH_NAMES, given

Json = dict[str, Any]


def evaluation_json(summary: Summary, settings: Mapping[str, Any]) -> Json:
    """What `eval --json` prints: the main contender at the top, and all of them under `contenders`.

    Accuracies, shares and weights lie in [0, 1], intervals are [low, high] of 95 %, times are milliseconds.
    """
    contenders = {name: standing_json(standing) for name, standing in summary.standings.items()}
    main = contenders[summary.main]
    return {
        "main": summary.main,
        **{key: main[key] for key in ("tasks", "mean_accuracy", "mean_ci95", "timings_ms")},
        "settings": dict(settings),
        "contenders": contenders,
        "against": {name: comparison_json(found) for name, found in summary.against.items()},
    }


def settings_json(manifest: Manifest, device: Device, contenders: Sequence[Contender]) -> Json:
    """All that the figures depend on, the examples apart; retrieval is that of the first contender's request."""
    defaults, base = manifest.defaults, manifest.base
    request = contenders[0].request
    return {
        "bundle": manifest.name,
        "base": {"source": base.source, "identity": base.identity, "precision": base.precision},
        "device": device.kind,
        **{name: given(getattr(request, name), getattr(defaults, name)) for name in ("neighbours", *WEIGH_NAMES)},
        "exclude": list(request.exclude),
        "exclude_own": contenders[0].exclude_own,
        "raw": given(request.raw, defaults.prompt_form == "raw"),
        "max_tokens": request.max_tokens or MAX_TOKENS,
        "resamples": RESAMPLES,
        "contenders": {contender.name: _contender_json(contender, manifest) for contender in contenders},
    }


def _contender_json(contender: Contender, manifest: Manifest) -> Json:
    if contender.kind == "base":
        return {"kind": "base"}
    merge = contender.request.merge or merge_settings(manifest.defaults)
    return {"kind": contender.kind, "method": merge.method, **merge.parameters(), "norm_guard": merge.norm_guard}


def standing_json(standing: Standing) -> Json:
    """One contender: accuracy of each task, their mean, time of each stage, weights, routing."""
    return {
        "tasks": {
            task: {"n": score.n, "accuracy": score.accuracy, "ci95": list(score.ci95)}
            for task, score in standing.tasks.items()
        },
        "mean_accuracy": standing.mean,
        "mean_ci95": None if standing.ci95 is None else list(standing.ci95),
        "timings_ms": {stage: round(spent, 3) for stage, spent in standing.timings_ms.items()},
        "weights": {task: dict(weights) for task, weights in standing.weights.items()},
        "routing": routing_json(standing.routing),
    }


def routing_json(routing: Routing) -> Json:
    """Counts of task x top task, and the reliability of the top task's share."""
    return {
        "confusion": {task: dict(counts) for task, counts in routing.confusion.items()},
        "reliability": [{"n": b.n, "top_share": b.share, "right": b.right} for b in routing.reliability],
        "calibration_error": routing.error,
    }


def comparison_json(found: Comparison) -> Json:
    """The main contender's mean over shared tasks less another's, and its accuracy on each of them less the other's."""
    return {
        "tasks": len(found.by_task),
        **_paired_json(found.paired),
        "by_task": {task: _paired_json(paired) for task, paired in found.by_task.items()},
    }


def _paired_json(paired: PairedDifference) -> Json:
    return {"difference": paired.difference, "ci95": list(paired.ci95), "wins": paired.wins}


def describe_evaluation(result: Mapping[str, Any]) -> list[str]:
    """The JSON value as a table of per cent, tasks by contenders, the mean last."""
    contenders = result["contenders"]
    tasks = sorted(set().union(*(found["tasks"] for found in contenders.values())))
    widest = max(map(len, (*tasks, "95 % interval")))
    widths = {name: max(len(name), 11) for name in contenders}

    def row(label: str, count: object, cells: Mapping[str, str]) -> str:
        return "  ".join([f"{label:{widest}}", f"{count:>5}", *(f"{cells[name]:>{w}}" for name, w in widths.items())])

    lines = [row("task", "n", {name: name for name in contenders})]
    for task in tasks:
        scores = {name: found["tasks"].get(task) for name, found in contenders.items()}
        count = max(score["n"] for score in scores.values() if score)
        lines.append(row(task, count, {n: percent(s["accuracy"] if s else None) for n, s in scores.items()}))
    lines.append(row("mean", "", {name: percent(found["mean_accuracy"]) for name, found in contenders.items()}))
    lines.append(row("95 % interval", "", {name: interval(found["mean_ci95"]) for name, found in contenders.items()}))
    counts = {name: str(len(found["tasks"])) for name, found in contenders.items()}
    if len(set(counts.values())) > 1:
        lines.append(row("tasks", "", counts))
    return [*lines, *(describe_comparison(result["main"], name, found) for name, found in result["against"].items())]


def describe_comparison(main: str, other: str, found: Mapping[str, Any]) -> str:
    """The difference of means in points as a sentence."""
    low, high = found["ci95"]
    return (
        f"{main} less {other}: {signed(found['difference'])} points ({signed(low)} to {signed(high)}) "
        f"over {found['tasks']} tasks"
    )


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent, '-' where there is none."""
    return "-" if share is None else f"{share * 100:.1f}"


def interval(found: Interval | None) -> str:
    """An interval of shares as per cent."""
    return "-" if found is None else f"{percent(found[0])}-{percent(found[1])}"


def signed(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{share * 100 + 0.0:+.1f}"
