"""An evaluation as a JSON value and as a table; prints nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from edgecompose.bundle.manifest import Manifest
from edgecompose.composer import Composer
from edgecompose.errors import MergeError, RetrievalError
from edgecompose.evaluation.bootstrap import RESAMPLES, Interval, PairedDifference
from edgecompose.evaluation.results import Comparison, Metrics, Routing, Summary
from edgecompose.evaluation.runner import MAX_TOKENS, Variant
from edgecompose.merging.methods import parameters_of
from edgecompose.settings import override, resolve

Json = dict[str, Any]


def evaluation_json(summary: Summary, settings: Mapping[str, Any]) -> Json:
    """What `eval --json` prints: the main variant at the top, and all of them under `variants`.

    Accuracies, shares and weights lie in [0, 1], intervals are [low, high] of 95 %, times are milliseconds.
    """
    variants = {name: metrics_json(metrics) for name, metrics in summary.metrics.items()}
    main = variants[summary.main]
    return {
        "main": summary.main,
        **{key: main[key] for key in ("tasks", "mean_accuracy", "mean_ci95", "timings_ms")},
        "settings": dict(settings),
        "variants": variants,
        "against": {name: comparison_json(comparison) for name, comparison in summary.against.items()},
    }


def settings_json(composer: Composer, variants: Sequence[Variant]) -> Json:
    """All that the figures depend on, the examples apart; retrieval is that of the first variant's request."""
    manifest = composer.bundle.manifest
    defaults, base = manifest.defaults, manifest.base
    request = variants[0].request
    return {
        "bundle": manifest.name,
        "base": {"source": base.source, "identity": base.identity, "precision": base.precision},
        "device": composer.device.kind,
        "kv_cache": composer.model.kv_cache,
        **dataclasses.asdict(override(defaults.retrieval, request.retrieval, RetrievalError)),
        "exclude": list(request.exclude),
        "exclude_own": variants[0].exclude_own,
        "raw": resolve(request.raw, defaults.prompt_form == "raw"),
        "max_tokens": request.max_tokens or MAX_TOKENS,
        "resamples": RESAMPLES,
        "variants": {variant.name: _variant_json(variant, manifest) for variant in variants},
    }


def _variant_json(variant: Variant, manifest: Manifest) -> Json:
    if variant.kind == "base":
        return {"kind": "base"}
    merge = override(manifest.defaults.merge, variant.request.merge, MergeError)
    return {"kind": variant.kind, "method": merge.method, **parameters_of(merge), "norm_guard": merge.norm_guard}


def metrics_json(metrics: Metrics) -> Json:
    """One variant: accuracy of each task, their mean, time of each stage, weights, routing."""
    return {
        "tasks": {
            task: {"n": score.n, "accuracy": score.accuracy, "ci95": list(score.ci95)}
            for task, score in metrics.tasks.items()
        },
        "mean_accuracy": metrics.mean,
        "mean_ci95": None if metrics.ci95 is None else list(metrics.ci95),
        "timings_ms": {stage: round(elapsed_ms, 3) for stage, elapsed_ms in metrics.timings_ms.items()},
        "weights": {task: dict(weights) for task, weights in metrics.weights.items()},
        "routing": routing_json(metrics.routing),
    }


def routing_json(routing: Routing) -> Json:
    """Counts of task x top task, and the reliability of the top task's share."""
    return {
        "confusion": {task: dict(counts) for task, counts in routing.confusion.items()},
        "reliability": [{"n": b.n, "top_share": b.share, "right": b.right} for b in routing.reliability],
        "calibration_error": routing.error,
    }


def comparison_json(comparison: Comparison) -> Json:
    """The main variant's mean over shared tasks less another's, and its accuracy on each of them less the other's."""
    return {
        "tasks": len(comparison.by_task),
        **_paired_json(comparison.paired),
        "by_task": {task: _paired_json(paired) for task, paired in comparison.by_task.items()},
    }


def _paired_json(paired: PairedDifference) -> Json:
    return {"difference": paired.difference, "ci95": list(paired.ci95), "wins": paired.wins}


def describe_evaluation(result: Mapping[str, Any]) -> list[str]:
    """The JSON value as a table of per cent, tasks by variants, the mean last."""
    variants = result["variants"]
    tasks = sorted(set().union(*(metrics["tasks"] for metrics in variants.values())))
    widest = max(map(len, (*tasks, "95 % interval")))
    widths = {name: max(len(name), 11) for name in variants}

    def row(label: str, count: object, cells: Mapping[str, str]) -> str:
        return "  ".join([f"{label:{widest}}", f"{count:>5}", *(f"{cells[name]:>{w}}" for name, w in widths.items())])

    lines = [row("task", "n", {name: name for name in variants})]
    for task in tasks:
        scores = {name: metrics["tasks"].get(task) for name, metrics in variants.items()}
        count = max(score["n"] for score in scores.values() if score)
        lines.append(row(task, count, {n: percent(s["accuracy"] if s else None) for n, s in scores.items()}))
    lines.append(row("mean", "", {name: percent(metrics["mean_accuracy"]) for name, metrics in variants.items()}))
    lines.append(row("95 % interval", "", {name: interval(metrics["mean_ci95"]) for name, metrics in variants.items()}))
    counts = {name: str(len(metrics["tasks"])) for name, metrics in variants.items()}
    if len(set(counts.values())) > 1:
        lines.append(row("tasks", "", counts))
    main, against = result["main"], result["against"]
    return [*lines, *(describe_comparison(main, name, comparison) for name, comparison in against.items())]


def describe_comparison(main: str, other: str, comparison: Mapping[str, Any]) -> str:
    """The difference of means in points as a sentence."""
    low, high = comparison["ci95"]
    return (
        f"{main} less {other}: {signed(comparison['difference'])} points ({signed(low)} to {signed(high)}) "
        f"over {comparison['tasks']} tasks"
    )


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent, '-' where there is none."""
    return "-" if share is None else f"{share * 100:.1f}"


def interval(bounds: Interval | None) -> str:
    """An interval of shares as per cent."""
    return "-" if bounds is None else f"{percent(bounds[0])}-{percent(bounds[1])}"


def signed(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{share * 100 + 0.0:+.1f}"
