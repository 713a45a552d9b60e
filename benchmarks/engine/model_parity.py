"""Parity of two devices: the decoder with blends of adapters, and the embedder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.engine.bases import PROMPT, Base
from benchmarks.engine.parity import Compared, one_line
from edgecompose.bundle.adapter import Adapter
from edgecompose.bundle.files import Bundle
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import Device
from edgecompose.merging.merger import Merger
from edgecompose.retrieval.embedder import Embedder, embedder_device
from edgecompose.settings import MergeSettings

Float = npt.NDArray[np.float32]
#: Of logits, by the precision of the base. CPU kernels for packed weights round activations to 8 bits, CUDA's do not:
#: that alone moves the logits of the demo base by up to 0.05.
LOGITS_TOLERANCE = {"fp32": 1e-3}
#: The same where the device's graph has attention in float16; on a CPU that moves the demo's logits by up to 2e-3 when
#: its packed weights compute in float32.
HALF_LOGITS_TOLERANCE = {"fp32": 5e-3, "fp16": 5e-3}
PACKED_LOGITS_TOLERANCE = 0.1
#: Of vectors of unit norm, an encoder in float32 on both sides.
EMBEDDER_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class DecoderParity(Compared):
    """Logits of a prompt and of some steps after it, on the same tokens.

    `equal` of `tokens` greedy choices agree; others may be near ties, so they do not count.
    """

    base: str
    blend: str
    tokens: int
    equal: int
    error: float
    tolerance: float
    worst: str


@dataclass(frozen=True, slots=True)
class EmbedderParity(Compared):
    """Vectors of some texts, by the encoder on the device and on the CPU; `error` is the largest difference."""

    embedder: str
    texts: int
    error: float
    tolerance: float
    worst: str


def decoder_parity(base: Base, device: Device, reference: Device, steps: int = 8) -> Iterator[DecoderParity]:
    """The base alone, with one adapter and with three: a prompt at once, then steps of one token."""
    tolerances = LOGITS_TOLERANCE if base.graphs[device.kind] == base.graphs["cpu"] else HALF_LOGITS_TOLERANCE
    tolerance = tolerances.get(base.spec.precision, PACKED_LOGITS_TOLERANCE)
    for name, adapters in {"no adapter": (), "one adapter": base.adapters[:1], "three": base.adapters[:3]}.items():
        expected, tokens = _logits(base, adapters, device=reference, steps=steps)
        error, equal, worst = 0.0, 0, ""
        try:
            logits, _ = _logits(base, adapters, device=device, steps=steps, tokens=tokens)
        except Exception as failure:
            error, worst = math.inf, one_line(failure)
        else:
            for i, (ours, theirs) in enumerate(zip(logits, expected, strict=True)):
                step = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
                equal += int(ours.argmax() == theirs.argmax())
                if not step <= error:
                    error, worst = math.inf if math.isnan(step) else step, f"step {i}" if i else "prompt"
        yield DecoderParity(
            base.name,
            blend=name,
            tokens=steps + 1,
            equal=equal,
            error=error,
            tolerance=tolerance,
            worst=worst,
        )


def _logits(
    base: Base, adapters: Sequence[Adapter], *, device: Device, steps: int, tokens: Sequence[int] | None = None
) -> tuple[list[Float], list[int]]:
    """Logits after the prompt and after each step, and the tokens that were fed: `tokens`, or the greedy ones."""
    weights = [1 / max(1, len(adapters))] * len(adapters)
    merged = Merger(device).merge(adapters, weights, MergeSettings("product"))
    ids, logits, chosen = base.prompt(), [], list[int]()
    state = Decoder(base.graphs[device.kind], base.spec, device).start(merged, len(ids) + steps)
    for step in range(steps + 1):
        logits.append(state.forward(ids)[0].copy())
        chosen.append(int(logits[-1].argmax()) if tokens is None else tokens[step])
        ids = [chosen[-1]]
    return logits, chosen


def embedder_parity(folder: Path, device: Device, reference: Device) -> Iterator[EmbedderParity]:
    """The encoder of a bundle, if it runs on the device: short texts, long ones, and one beyond its window."""
    bundle = Bundle(folder)
    spec = bundle.manifest.embedder
    if embedder_device(spec, device) != device:
        return
    texts = ("yes", PROMPT, f"{PROMPT} " * 4, f"{PROMPT} " * 100)
    graph, tokenizer = bundle.path(spec.graph), bundle.path(spec.tokenizer)
    theirs = Embedder(graph, tokenizer=tokenizer, spec=spec, device=reference)
    error, worst = 0.0, ""
    try:
        ours = Embedder(graph, tokenizer=tokenizer, spec=spec, device=device)
        for text in texts:
            difference = float(np.abs(ours.embed(text) - theirs.embed(text)).max())
            if difference > error:
                error, worst = difference, f"{len(text)} characters"
    except Exception as failure:
        error, worst = math.inf, one_line(failure)
    yield EmbedderParity(folder.name, texts=len(texts), error=error, tolerance=EMBEDDER_TOLERANCE, worst=worst)
