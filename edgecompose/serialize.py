"""Answers, retrievals and bundles as JSON values and as lines of text."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.manifest import Manifest
from edgecompose.engine import device as devices
from edgecompose.engine.device import Device
from edgecompose.engine.merged import MergeReport
from edgecompose.errors import DeviceError
from edgecompose.merging.methods import parameters_of
from edgecompose.request import Answer, Composition
from edgecompose.retrieval.index import Neighbour
from edgecompose.retrieval.retriever import Retrieval
from edgecompose.settings import MergeSettings
from edgecompose.timing import STAGES

_BAR_WIDTH = 24
_SHOWN_NEIGHBOURS = 5
#: Cosine below which two adapters are said to work against each other.
_OPPOSED = -0.05

Json = dict[str, Any]


def answer_json(answer: Answer) -> Json:
    """An answer as `run --json` prints it."""
    result: Json = {
        "prompt": answer.prompt,
        "answer": answer.text,
        "method": answer.settings.method,
        "attachment": answer.attachment,
        **retrieval_json(answer.retrieval),
        "device": device_json(answer.device),
        "kv_cache": answer.kv_cache,
        "timings_ms": {stage: round(answer.timings_ms[stage], 3) for stage in STAGES},
        "tokens": {
            "prompt": answer.prompt_tokens,
            "generated": answer.generated_tokens,
            "dropped": answer.dropped_tokens,
            "drafted": answer.drafted_tokens,
            "accepted": answer.accepted_tokens,
        },
        "finish": answer.finish,
        "prompt_form": answer.prompt_form,
        "composition": answer.composition,
        "merge": merge_json(answer.settings, answer.report),
    }
    if answer.choices is not None:
        result["choices"] = dict(answer.choices)
    return result


def retrieval_json(retrieval: Retrieval) -> Json:
    """Weights, resemblance, neighbours and distribution."""
    return {
        "weights": dict(retrieval.weights),
        "resemblance": retrieval.resemblance,
        "neighbours": [_neighbour_json(n) for n in retrieval.neighbours],
        "distribution": dict(retrieval.distribution),
    }


def composition_json(composition: Composition) -> Json:
    """A blend: method, weights, ranks and content hash."""
    return {
        "method": composition.settings.method,
        **retrieval_json(composition.retrieval),
        "ranks": {name: module.rank for name, module in composition.merged.modules.items()},
        "composition": composition.merged.digest,
        "merge": merge_json(composition.settings, composition.merged.report),
    }


def merge_json(settings: MergeSettings, report: MergeReport) -> Json:
    """Parameters that the method read, and what it did to the sum."""
    return {**parameters_of(settings), "norm_factor": report.norm_factor, "discarded_energy": report.discarded_energy}


def compatibility_json(names: Sequence[str], inner: npt.NDArray[np.float64]) -> Json:
    """Norm of each adapter's update and the cosine of every pair, in -1 .. 1 (0 where an update is zero)."""
    norms = np.sqrt(np.maximum(np.diag(inner), 0))
    scale = np.outer(norms, norms)
    cosines = np.divide(inner, scale, out=np.zeros_like(inner), where=scale > 0)
    return {
        "norms": {name: float(norm) for name, norm in zip(names, norms, strict=True)},
        "cosines": {
            one: {other: float(cosines[i, j]) for j, other in enumerate(names) if j != i} for i, one in enumerate(names)
        },
    }


def device_json(device: Device) -> Json:
    """Providers and the reason for them."""
    return {"kind": device.kind, "providers": list(device.providers), "reason": device.reason}


def manifest_json(manifest: Manifest) -> Json:
    """What `inspect --json` prints: the manifest without the hash of every file."""
    base, embedder = manifest.base, manifest.embedder
    distance = base.distance
    return {
        "name": manifest.name,
        "schema_version": manifest.schema_version,
        "created_by": manifest.created_by,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "files": len(manifest.files),
        "base": {
            "source": base.source,
            "identity": base.identity,
            "precision": base.precision,
            "layers": base.layers,
            "context": base.context,
            "slots": {g.name: [g.n_in, g.n_out] for g in base.slots},
            "distance": None if distance is None else {"kl": distance.kl, "top1": distance.top1},
            "fuse": base.fusing is not None,
            "kv_caches": {name: kv.kl for name, kv in base.kv_graphs.items()},
        },
        "embedder": {
            "source": embedder.source,
            "precision": embedder.precision,
            "dimension": embedder.dimension,
            "max_length": embedder.max_length,
            "pooling": embedder.pooling,
        },
        "tasks": {n: {"adapters": t.adapters, "examples": t.examples} for n, t in sorted(manifest.tasks.items())},
        "adapters": {
            name: {
                "rank": a.rank,
                "bits": a.bits,
                "bytes": manifest.files[a.file].bytes,
                "quantization_error": a.error,
                "source": a.source,
                "validation": None if a.validation is None else dataclasses.asdict(a.validation),
            }
            for name, a in sorted(manifest.adapters.items())
        },
        "defaults": dataclasses.asdict(manifest.defaults),
    }


def doctor_json() -> Json:
    """Versions, providers, the device that `auto` takes and why, and what is wrong with the installation."""
    packages = devices.installed_packages()
    problems = []
    if len(packages) > 1:
        problems.append(
            f"{' and '.join(packages)} are both installed and overwrite each other; "
            "uninstall both, then install one extra: edgecompose[cpu] or edgecompose[gpu]"
        )
    if not devices.telemetry_disabled():
        problems.append("ONNX Runtime's telemetry is not switched off; something imported it before edgecompose")
    try:
        chosen = device_json(devices.choose_device("auto"))
    except DeviceError as error:  # pragma: no cover - auto falls back
        chosen, problems = {"kind": "none", "providers": [], "reason": str(error)}, [*problems, str(error)]
    import usearch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"onnxruntime": devices.runtime_version(), "usearch": usearch.__version__, "numpy": np.__version__},
        "onnxruntime_packages": packages,
        "available_providers": list(devices.available_providers()),
        "device": chosen,
        "telemetry_disabled": devices.telemetry_disabled(),
        "problems": problems,
    }


def explain_retrieval(retrieval: Retrieval) -> list[str]:
    """Neighbours, distribution and weights as lines of text."""
    lines = []
    if retrieval.neighbours:
        nearest = retrieval.neighbours[:_SHOWN_NEIGHBOURS]
        lines.append(f"neighbours    {len(retrieval.neighbours)} examples, the nearest:")
        lines += [f"              {n.similarity:6.3f}  {n.task} (example {n.key})" for n in nearest]
        lines.append("tasks         share of the neighbours' weight (* kept by the nucleus)")
        lines += _bars(retrieval.distribution, retrieval.nucleus)
    if retrieval.resemblance is not None:
        lines.append(f"resemblance   {retrieval.resemblance:.2f} (1 is that of a task's own examples)")
    if retrieval.weights:
        lines.append("adapters      " + ", ".join(f"{name} {weight:.3f}" for name, weight in retrieval.weights.items()))
    else:
        lines.append("adapters      none (the base alone)")
    return lines


def explain_answer(answer: Answer) -> list[str]:
    """How an answer was computed, as lines of text."""
    timings = "  ".join(f"{stage} {answer.timings_ms[stage]:.1f}" for stage in STAGES)
    decode = answer.timings_ms["decode"]
    speed = f", {answer.generated_tokens / decode * 1e3:.0f} tokens/s" if answer.choices is None and decode else ""
    template = ", in the chat template" if answer.prompt_form == "chat" else ""
    lines = explain_retrieval(answer.retrieval)
    place, elsewhere = answer.embedder_device, []
    if place is not None and place.kind != answer.device.kind:
        elsewhere.append(f"embedder      {place.kind} ({place.reason})")
    drafts = [f"drafts        {answer.accepted_tokens} of {answer.drafted_tokens} drafted tokens were accepted"]
    if answer.choices is not None:
        lines.append("choices       mean log-likelihood a token")
        lines += [f"              {score:8.3f}  {choice}" for choice, score in _ranked(answer.choices)]
    return [
        *lines,
        f"method        {_described_method(answer)}, composition {answer.composition[:12]}, "
        f"{'fused' if answer.attachment == 'fuse' else 'attached'}",
        f"device        {answer.device.kind} ({answer.device.reason})",
        *([] if answer.kv_cache == "float32" else [f"KV cache      {answer.kv_cache}"]),
        *elsewhere,
        f"tokens        {answer.prompt_tokens} in the prompt{template}, {answer.generated_tokens} in the answer{speed}",
        *(drafts if answer.drafted_tokens else []),
        f"time (ms)     {timings}",
    ]


def describe_manifest(manifest: Manifest) -> list[str]:
    """A bundle as lines of text."""
    shown = manifest_json(manifest)
    base, embedder = shown["base"], shown["embedder"]
    distance = base["distance"]
    fuse = ", can be fused" if base["fuse"] else ""
    quality = "" if distance is None else f", KL {distance['kl']:.4f} and top-1 {distance['top1']:.1%} against float32"
    lines = [
        f"bundle        {shown['name']} (schema {shown['schema_version']}), {shown['files']} files, "
        f"{shown['bytes'] / 1e6:.1f} MB",
        f"base          {base['source']}, {base['precision']}, {base['layers']} layers, context {base['context']}"
        + quality
        + fuse,
        "KV caches     " + ", ".join(["float32", *(f"{n} (KL {kl:.4f})" for n, kl in base["kv_caches"].items())]),
        f"embedder      {embedder['source']}, {embedder['precision']}, {embedder['dimension']} dimensions",
        f"slots         {', '.join(base['slots'])}",
        "task                  examples  adapters",
    ]
    for name, task in shown["tasks"].items():
        adapters = " + ".join(f"{weight:g} {adapter}" for adapter, weight in task["adapters"].items())
        lines.append(f"{name:20}  {task['examples']:8}  {adapters or 'the base alone'}")
    lines.append("adapter               rank  bits     KB  error  base   with it  verdict (validation examples)")
    return lines + [_described_adapter(name, adapter) for name, adapter in shown["adapters"].items()]


def _described_adapter(name: str, adapter: Mapping[str, Any]) -> str:
    line = (
        f"{name:20}  {adapter['rank']:4}  {adapter['bits']:4}  {adapter['bytes'] / 1e3:5.0f}  "
        f"{adapter['quantization_error']:.3f}"
    )
    validation = adapter["validation"]
    if validation is None:
        return line
    gain = f"{validation['base']:5.1%}  {validation['accuracy']:7.1%}"
    return f"{line}  {gain}  {validation['verdict']} ({validation['examples']})"


def describe_compatibility(compatibility: Mapping[str, Any]) -> list[str]:
    """Norms and cosines as a table; negative pairs work against each other and predict a bad blend."""
    names = list(compatibility["norms"])
    widest = max((len(name) for name in names), default=0)
    lines = [f"{'cosine of updates':{widest}}  {'norm':>8}  " + "  ".join(f"{name[:8]:>8}" for name in names)]
    width = len(lines[0].split("  ")[0])
    for one in names:
        row = (f"{1.0 if one == other else compatibility['cosines'][one][other]:8.3f}" for other in names)
        lines.append(f"{one:{width}}  {compatibility['norms'][one]:8.3f}  " + "  ".join(row))
    opposed = [
        f"{one} and {other} ({compatibility['cosines'][one][other]:.3f})"
        for i, one in enumerate(names)
        for other in names[i + 1 :]
        if compatibility["cosines"][one][other] < _OPPOSED
    ]
    return [*lines, f"against each other: {', '.join(opposed)}"] if opposed else lines


def describe_doctor(report: Mapping[str, Any]) -> list[str]:
    """The doctor's findings as lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    packages = ", ".join(f"{name} {version}" for name, version in report["onnxruntime_packages"].items())
    return [
        f"python        {report['python']} on {report['platform']}",
        f"versions      {versions}",
        f"packages      {packages}",
        f"providers     {', '.join(report['available_providers'])}",
        f"device        {report['device']['kind']}: {report['device']['reason']}",
        f"telemetry     {'off' if report['telemetry_disabled'] else 'ON'}",
        *(f"problem       {problem}" for problem in report["problems"]),
    ]


def _described_method(answer: Answer) -> str:
    parameters = [f"{name} {value}" for name, value in parameters_of(answer.settings).items() if value is not None]
    if answer.settings.method == "svd":
        parameters.append(f"{answer.report.discarded_energy:.1%} of the squared norm cut off")
    if answer.settings.norm_guard:
        parameters.append(f"norm guard {answer.report.norm_factor:.3f}")
    return answer.settings.method + (f" ({', '.join(parameters)})" if parameters else "")


def _neighbour_json(neighbour: Neighbour) -> Json:
    return {"task": neighbour.task, "key": neighbour.key, "similarity": neighbour.similarity}


def _bars(distribution: Mapping[str, float], nucleus: Mapping[str, float]) -> list[str]:
    widest = max(map(len, distribution))
    return [
        f"            {'*' if task in nucleus else ' '} {task:{widest}}  {share:6.1%}  "
        f"{'█' * round(share * _BAR_WIDTH)}"
        for task, share in distribution.items()
    ]


def _ranked(choices: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(choices.items(), key=lambda item: -item[1])
