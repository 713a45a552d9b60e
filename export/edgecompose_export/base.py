"""A base model to a decoder graph with adapter slots, in the precision that was chosen, its distance measured."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from edgecompose.bundle.atomic import new_folder
from edgecompose.bundle.records import value_from_json
from edgecompose.bundle.specs import BaseSpec, Distance
from edgecompose.engine.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.memory import release_freed_memory
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import EdgeComposeError, ExportError
from edgecompose.generation.decode import log_softmax
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.base_source import Base, open_base
from edgecompose_export.cuda_graph import write_cuda_graph
from edgecompose_export.datasets import read_json
from edgecompose_export.decoder_graph import slot_groups, write_decoder
from edgecompose_export.folding import write_folding
from edgecompose_export.graph_writer import DataFile
from edgecompose_export.layerwise import (
    Comparison,
    FloatStates,
    compare,
    float_logits,
    float_states,
    stored_logits,
    stored_states,
)
from edgecompose_export.mixed_precision import Choice, calibration_texts, choose_forms
from edgecompose_export.stored_weights import (
    EIGHT,
    FOUR,
    Form,
    Quantised,
    StoredWeights,
    linear_tensors,
    source_form,
)
from edgecompose_export.weight_source import EMBEDDING, HEAD, WeightSource

Precision = Literal["source", "auto", "int8", "int4", "fp16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
#: Precisions whose weights a blend can be written into.
FLOAT_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
SPEC_FILE = "base.json"
#: Mean KL divergence (nats) from the file's float values that a base may have.
LARGEST_KL = 0.01
#: Largest query, key or value for which attention is computed in float16 (numbers end at 65504).
LARGEST_HALF = 16384.0
#: Positions of the calibration prompts that are run at most, for bases of so many weights or more.
_POSITIONS = ((3_000_000_000, 400), (0, 4096))
#: Weights up to which 'auto' is what a folder gets unless a precision is named.
_LARGEST_MIXED = 3_000_000_000
#: Bytes of a decoder that is opened as a whole, to see that it gives what its blocks give one after another.
_LARGEST_OPENED = 2_500_000_000
#: KL divergence (nats) between the whole decoder and its blocks that other orders of sums explain, in floats, and in
#: parts of the divergence that rounding brings.
_ROUNDING_KL, _ROUNDING = 1e-5, 4.0
#: Mixing 4 and 8 bits: sum of measured costs to begin with, divergence of 8 bits alone that is assumed, share of the
#: limit that is near enough, and tries after which less is enough.
_FIRST_BUDGET, _FLOOR, _NEAR, _TRIES = 0.006, 0.002, 0.85, 3
_NO_ADAPTER = MergedAdapter({}, "base")


def export_base(
    path: Path,
    output: Path,
    precision: Precision | None = None,
    *,
    accept_distance: bool = False,
    advance: Callable[[str], None] = lambda step: None,
) -> BaseSpec:
    """Write `decoder.onnx`, `tokenizer.json`, `chat_template.jinja` and `base.json` to `output`, which must not exist.

    Weights go from the file to the decoder a few rows at a time. A float base (fp32, fp16) also gets the graphs of
    `folding.write_folding`. Every decoder gets another for CUDA beside it (`cuda_graph`), unless queries, keys or
    values are too large for attention in float16.

    Args:
        path: as `open_base` takes it.
        precision: 'source' keeps every tensor of a GGUF file in its own codes, and float tensors as they are; 'auto'
            mixes 4 and 8 bits by measured sensitivity; None is 'source' for a GGUF file, 'auto' for a folder, and
            'int8' for one of more than _LARGEST_MIXED weights.
        accept_distance: keep a base whose KL divergence exceeds LARGEST_KL.
        advance: called with the name of each step as it begins.

    Raises:
        ExportError: as `open_base` does, `output` exists or cannot be written, or the result is too far from
            the values of the file.
    """
    try:
        return _export_to(path, output, precision, accept_distance, advance)
    except OSError as error:
        reason = error.strerror or str(error)
        of_base = isinstance(error.filename, str) and Path(error.filename).is_relative_to(path)
        if of_base and not output.is_relative_to(path):
            raise ExportError(f"'{error.filename}' cannot be read: {reason}; check it, or copy it again") from error
        raise ExportError(f"'{output}' cannot be written: {reason}; make room, or give another folder") from error
    except MemoryError as error:
        raise ExportError(f"base '{path}' takes more memory than there is; close programs, or give it more") from error
    except EdgeComposeError as error:
        named = isinstance(error, ExportError) and (path.name in str(error) or output.name in str(error))
        raise error if named else ExportError(f"base '{path}': {error}") from error


def _export_to(
    path: Path, output: Path, precision: Precision | None, accept_distance: bool, advance: Callable[[str], None]
) -> BaseSpec:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"'{output}' exists and is not empty; remove it or give another folder")
    advance("opening the base")
    base = open_base(path)
    chosen = precision or _usual_precision(base)
    if output.is_dir():
        output.rmdir()
    with new_folder(output) as work:
        return _export(base, work, chosen, accept_distance, advance)


def calibration_prompts() -> list[str]:
    """Prompts of many kinds, one a line, on which distances are measured."""
    text = (resources.files("edgecompose_export") / "prompts.txt").read_text(encoding="utf-8")
    return [line.replace("\\n", "\n") for line in text.splitlines() if line]


def read_base_spec(folder: Path) -> BaseSpec:
    """The description that `export_base` wrote."""
    path = folder / SPEC_FILE
    if not path.is_file():
        raise ExportError(f"'{folder}' holds no {SPEC_FILE}; make it with 'edgecompose-export base'")
    return value_from_json(BaseSpec, read_json(path), SPEC_FILE)


def uniform_forms(source: WeightSource, precision: Precision) -> dict[str, Form]:
    """The form of each weight under a precision other than 'auto', by tensor.

    The output layer and the embedding have 8 bits where linear modules have 4; what a file keeps in as many bits or
    fewer stays as it is.
    """
    tied = source.config.tied
    tensors = [*linear_tensors(source.config), HEAD, *([] if tied else [EMBEDDING])]
    forms: dict[str, Form] = {}
    for tensor in tensors:
        own = source_form(source.type_of(EMBEDDING if tensor == HEAD and tied else tensor))
        if precision == "source":
            forms[tensor] = own
        elif precision in FLOAT_PRECISIONS:
            forms[tensor] = "float16" if precision == "fp16" else "float32"
        else:
            bits = 8 if precision == "int8" or tensor in (HEAD, EMBEDDING) else 4
            kept = not isinstance(own, str) and own.bits <= bits
            forms[tensor] = own if kept else EIGHT if bits == 8 or _ragged(source, tensor) else FOUR
    return forms


def _ragged(source: WeightSource, tensor: str) -> bool:
    """Whether rows end inside a block, where block sums cannot be taken."""
    return source.shape(tensor)[1] % FOUR.block != 0


def _export(
    base: Base, work: Path, precision: Precision, accept_distance: bool, advance: Callable[[str], None]
) -> BaseSpec:
    spec = _describe(base, precision)
    base.tokenizer.write(work / spec.tokenizer)
    if base.tokenizer.template is not None and spec.chat_template is not None:
        (work / spec.chat_template).write_text(base.tokenizer.template, encoding="utf-8")
    tokenizer = Tokenizer(work / spec.tokenizer, chat_template=base.tokenizer.template)
    prompts = _calibration(tokenizer, base.weights)
    texts = calibration_texts(tokenizer) if precision == "auto" else []
    del tokenizer
    release_freed_memory()
    advance("computing the reference in float32")
    reference = float_states(base.weights, prompts)
    if precision == "auto":
        advance("quantising to 4 bits, and measuring what that costs each module")
        with tempfile.TemporaryDirectory(dir=work, prefix="four-bits-") as scratch:
            choice = choose_forms(base.weights, prompts, texts, reference, Path(scratch))
            spec, comparison = _write_mixed(base, work, spec, choice, reference, prompts, advance)
    else:
        forms = uniform_forms(base.weights, precision)
        spec, comparison = _write(base, work, spec, forms, {}, reference, prompts, advance)
    if not math.isfinite(comparison.kl):
        raise ExportError(f"precision {precision} gives logits that are not finite; copy the base again")
    if comparison.kl > LARGEST_KL and not accept_distance:
        raise ExportError(
            f"precision {precision} is {comparison.kl:.3f} nats from the values of the file (top-1 "
            f"{comparison.top1:.0%}), expected at most {LARGEST_KL}; use --precision "
            f"{'int8' if precision == 'int4' else 'auto'}, or --accept-distance to keep it"
        )
    distance = Distance(
        kl=max(0.0, comparison.kl), top1=comparison.top1, prompts=len(prompts), positions=comparison.positions,
        nll=comparison.nll_other, nll_float=comparison.nll,
    )  # fmt: skip
    spec = dataclasses.replace(spec, distance=distance)
    (work / SPEC_FILE).write_text(json.dumps(dataclasses.asdict(spec), indent=1) + "\n", encoding="utf-8")
    return spec


def _write_mixed(
    base: Base, work: Path, spec: BaseSpec, choice: Choice, reference: FloatStates, prompts: Sequence[Sequence[int]],
    advance: Callable[[str], None],
) -> tuple[BaseSpec, Comparison]:  # fmt: skip
    """Write a mix with as much of it in 4 bits as stays within LARGEST_KL.

    The divergence is nearly linear in what the measured costs add up to, so two tries and the line through them tell
    where the limit is.
    """
    budget, tried = min(_FIRST_BUDGET, choice.cost), [(0.0, _FLOOR)]
    while True:
        forms = choice.within(budget)
        described, comparison = _write(base, work, spec, forms, choice.quantised, reference, prompts, advance)
        near = _NEAR * LARGEST_KL <= comparison.kl <= LARGEST_KL
        if near or budget == 0 or (comparison.kl <= LARGEST_KL and (budget >= choice.cost or len(tried) > _TRIES)):
            return described, comparison
        tried = [*tried, (budget, comparison.kl)]
        (low, low_kl), (high, high_kl) = sorted(tried)[-2:] if comparison.kl < LARGEST_KL else sorted(tried)[:2]
        slope = max((high_kl - low_kl) / (high - low), 0.1)
        aim = (_NEAR + 1) / 2 * LARGEST_KL
        advance(f"{comparison.kl:.4f} nats: {'fewer' if comparison.kl > LARGEST_KL else 'more'} modules in 4 bits")
        budget = min(max(0.0, low + (aim - low_kl) / slope), choice.cost)
        if len(tried) > _TRIES and comparison.kl > LARGEST_KL:
            budget *= 0.8 ** (len(tried) - _TRIES)


def _write(
    base: Base, work: Path, spec: BaseSpec, forms: Mapping[str, Form], quantised: Mapping[str, Quantised],
    reference: FloatStates, prompts: Sequence[Sequence[int]], advance: Callable[[str], None],
) -> tuple[BaseSpec, Comparison]:  # fmt: skip
    """Write the decoder's graphs and data, and compare it with the reference."""
    source, config = base.weights, base.weights.config
    advance("writing the weights")
    with DataFile(work / f"{spec.graph}.data") as data:
        stored = StoredWeights(source, forms, data, reference.importance, quantised)
        graph = write_decoder(config, stored, slots=True)
        stored.fill()
    graph.save(work / spec.graph)
    if spec.precision in FLOAT_PRECISIONS:
        spec = dataclasses.replace(spec, fusing=write_folding(config, stored, work))
    if reference.largest <= LARGEST_HALF:
        spec = _write_cuda_graphs(work, spec)
    advance("measuring the distance from the values of the file")
    states = stored_states(source, stored, work, prompts)
    following = [token for prompt in prompts for token in (*prompt[1:], -1)]
    exact, near = (np.concatenate(parts) for parts in (reference.states, states))
    comparison = compare(float_logits(source, exact), stored_logits(config, stored, work, near), following)
    release_freed_memory()
    if (work / f"{spec.graph}.data").stat().st_size <= _LARGEST_OPENED:
        _check_whole(work, spec, stored, source, prompts[0], states[0], max(_ROUNDING_KL, _ROUNDING * comparison.kl))
    return spec, comparison


def _check_whole(
    work: Path, spec: BaseSpec, stored: StoredWeights, source: WeightSource, prompt: Sequence[int],
    states: np.ndarray[tuple[int, ...], np.dtype[np.float32]], limit: float,
) -> None:  # fmt: skip
    """See that the decoder as a whole gives what its blocks give one after another, but for the order of sums.

    Where activations are rounded to 8 bits, another last bit before is another code behind.
    """
    blockwise = log_softmax(np.concatenate(list(stored_logits(source.config, stored, work, states)), -1))
    decoder = Decoder(work / spec.graph, spec, choose_device("cpu"))
    whole = log_softmax(decoder.start(_NO_ADAPTER, len(prompt)).forward(prompt, kept=len(prompt)))
    kl = float((np.exp(blockwise) * (blockwise - whole)).sum(-1).mean())
    if not kl <= limit:
        raise ExportError(
            f"the decoder is {kl:.2g} nats from its own blocks, expected at most {limit:.2g}; "
            "this is an error of edgecompose-export: report it with the name of the base"
        )


def _usual_precision(base: Base) -> Precision:
    """What a caller who names no precision gets: measuring a mix takes too long for the largest bases."""
    if base.path.is_file():
        return "source"
    return "auto" if _size(base.weights) < _LARGEST_MIXED else "int8"


def _size(source: WeightSource) -> int:
    """Weights of all linear modules."""
    return sum(int(np.prod(source.shape(tensor))) for tensor in linear_tensors(source.config))


def _calibration(tokenizer: Tokenizer, source: WeightSource) -> list[list[int]]:
    """Ids of calibration prompts, in the form in which the base is asked; fewer for large bases."""
    limit = next(positions for weights, positions in _POSITIONS if _size(source) >= weights)
    prompts: list[list[int]] = []
    for text in calibration_prompts():
        ids = _render(tokenizer, text)[: source.config.context]
        if prompts and sum(map(len, prompts)) + len(ids) > limit:
            break
        prompts.append(ids)
    return prompts


def _render(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if tokenizer.has_chat_template:
        return tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]))
    return tokenizer.encode_prompt(prompt)


def _describe(base: Base, precision: Precision) -> BaseSpec:
    config, tokenizer = base.weights.config, base.tokenizer
    return BaseSpec(
        graph="decoder.onnx", tokenizer="tokenizer.json", identity=base.identity, precision=precision,
        context=config.context, kv_heads=config.kv_heads, head_size=config.head_size, vocabulary=config.vocabulary,
        end_tokens=tokenizer.end_tokens, slots=slot_groups(config),
        chat_template=None if tokenizer.template is None else "chat_template.jinja", source=base.weights.name,
        architecture=config.architecture.name, long_from=config.long_from,
    )  # fmt: skip


def _write_cuda_graphs(output: Path, spec: BaseSpec) -> BaseSpec:
    """Write the decoders for CUDA, and name them."""
    folding = spec.fusing
    if folding is not None:
        folded = write_cuda_graph(output / folding.decoder_graph)
        folding = dataclasses.replace(folding, cuda_decoder_graph=folded)
    return dataclasses.replace(spec, fusing=folding, cuda_graph=write_cuda_graph(output / spec.graph))
