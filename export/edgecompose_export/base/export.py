"""Exports a base: a decoder graph with adapter slots in one precision, and its measured distance from the file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgecompose.bundle.atomic import new_folder
from edgecompose.bundle.specs import BaseSpec, Distance
from edgecompose.engine.memory import release_freed_memory
from edgecompose.errors import EdgeComposeError, ExportError
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.base.precision import Precision, default_precision, uniform_forms
from edgecompose_export.base.source import Base, open_base
from edgecompose_export.base.spec import SPEC_FILE, describe_base
from edgecompose_export.base.write import KV_BITS, BaseWriter
from edgecompose_export.calibration.comparison import Comparison
from edgecompose_export.calibration.mixed_precision import choose_forms
from edgecompose_export.calibration.prompts import calibration_ids, calibration_texts, kv_texts
from edgecompose_export.calibration.reference import float_states

#: Largest mean KL divergence (nats) of a base from the float values of its file.
LARGEST_KL = 0.01


def export_base(
    path: Path,
    output: Path,
    precision: Precision | None = None,
    *,
    accept_distance: bool = False,
    advance: Callable[[str], None] = lambda step: None,
) -> BaseSpec:
    """Write `decoder.onnx`, `tokenizer.json`, `chat_template.jinja` and `base.json` to `output`, which must not exist.

    Weights are copied from the file to the decoder a few rows at a time. A float base (fp32, fp16) also gets the graphs
    of `graphs.fuse`. Every decoder gets a second one for CUDA (`graphs.cuda`), unless queries, keys or values are too
    large for attention in float16. The decoder with slots gets one for each kind of quantised keys and values
    (`graphs.kv_cache`) that stays near float caches.

    Args:
        path: as for `open_base`.
        precision: 'source' keeps every tensor of a GGUF file in its own codes, and float tensors as they are; 'auto'
            mixes 4 and 8 bits by measured sensitivity; None chooses `default_precision`.
        accept_distance: keep a base whose KL divergence exceeds LARGEST_KL.
        advance: called with the name of each step as it begins.

    Raises:
        ExportError: there is no base that can be exported, `output` exists or cannot be written, or the result is too
            far from the values of the file.
    """
    try:
        return _export_to(path, output, precision, accept_distance=accept_distance, advance=advance)
    except OSError as error:
        reason = str(error) if error.errno is None else os.strerror(error.errno)
        of_base = isinstance(error.filename, str) and Path(error.filename).is_relative_to(path)
        if of_base and not output.is_relative_to(path):
            raise ExportError(f"'{error.filename}' cannot be read: {reason}; check it, or copy it again") from error
        raise ExportError(f"'{output}' cannot be written: {reason}; make room, or give another folder") from error
    except MemoryError as error:
        raise ExportError(
            f"base '{path}' needs more memory than is free; close other programs, or use a machine with more memory"
        ) from error
    except EdgeComposeError as error:
        named = isinstance(error, ExportError) and (path.name in str(error) or output.name in str(error))
        raise error if named else ExportError(f"base '{path}': {error}") from error


def _export_to(
    path: Path, output: Path, precision: Precision | None, *, accept_distance: bool, advance: Callable[[str], None]
) -> BaseSpec:
    with new_folder(output) as work:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ExportError(f"'{output}' exists and is not empty; remove it or give another folder")
        advance("opening the base")
        base = open_base(path)
        return _export(
            base, work, precision or default_precision(base), accept_distance=accept_distance, advance=advance
        )


def _export(
    base: Base, work: Path, precision: Precision, *, accept_distance: bool, advance: Callable[[str], None]
) -> BaseSpec:
    spec = describe_base(base, precision)
    tokenizer = _write_tokenizer(base, work, spec)
    prompts, openings = calibration_ids(tokenizer, base.weights), kv_texts(tokenizer, base.weights)
    texts = calibration_texts(tokenizer) if spec.precision == "auto" else []
    del tokenizer
    release_freed_memory()
    advance("computing the reference in float32")
    reference = float_states(base.weights, prompts, kv_bits=tuple(KV_BITS), kv_texts=openings)
    writer = BaseWriter(base, work, reference=reference, prompts=prompts, advance=advance)
    if precision == "auto":
        advance("quantising to 4 bits, and measuring the cost for each module")
        with tempfile.TemporaryDirectory(dir=work, prefix="four-bits-") as scratch:
            choice = choose_forms(
                base.weights, prompts=prompts, texts=texts, reference=reference, scratch=Path(scratch)
            )
            spec, comparison = writer.write_mixed(spec, choice, largest_kl=LARGEST_KL)
    else:
        spec, comparison = writer.write(spec, uniform_forms(base.weights, precision))
    _check_distance(precision, comparison, accept_distance=accept_distance)
    distance = Distance(
        kl=max(0.0, comparison.kl),
        top1=comparison.top1,
        prompts=len(prompts),
        positions=comparison.positions,
        nll=comparison.nll_other,
        nll_float=comparison.nll,
    )
    kv_graphs = writer.write_kv_graphs(spec)
    spec = dataclasses.replace(spec, distance=distance, kv_graphs=kv_graphs)
    (work / SPEC_FILE).write_text(json.dumps(dataclasses.asdict(spec), indent=1) + "\n", encoding="utf-8")
    return spec


def _write_tokenizer(base: Base, work: Path, spec: BaseSpec) -> Tokenizer:
    """Write the tokenizer and the chat template, and open them."""
    base.tokenizer.write(work / spec.tokenizer)
    if base.tokenizer.template is not None and spec.chat_template is not None:
        (work / spec.chat_template).write_text(base.tokenizer.template, encoding="utf-8")
    return Tokenizer(work / spec.tokenizer, chat_template=base.tokenizer.template)


def _check_distance(precision: Precision, comparison: Comparison, *, accept_distance: bool) -> None:
    if not math.isfinite(comparison.kl):
        raise ExportError(f"precision {precision} gives logits that are not finite; copy the base again")
    if comparison.kl > LARGEST_KL and not accept_distance:
        raise ExportError(
            f"precision {precision} is {comparison.kl:.3f} nats from the values of the file (top-1 "
            f"{comparison.top1:.0%}), expected at most {LARGEST_KL}; use --precision "
            f"{'int8' if precision == 'int4' else 'auto'}, or --accept-distance to keep it"
        )
