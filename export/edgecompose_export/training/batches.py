"""Training examples as token ids, and the plan of batches that a run follows."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.retrieval.examples import Example

PromptForm = Literal["chat", "raw", "both"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The settings of a training run, which the report beside the adapter records.

    `alpha` / `rank` is the LoRA scale; `learning_rate` is the peak of a cosine with 6 % warm-up;
    `max_length` is in tokens, and longer examples are left out; `batch` is in examples.
    """

    rank: int = 8
    alpha: int = 16
    epochs: int = 2
    learning_rate: float = 1e-3
    batch: int = 8
    max_length: int = 512
    prompt_form: PromptForm = "both"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt and answer; `answer` is the number of ids of the answer, at the end."""

    ids: tuple[int, ...]
    answer: int


def encode_example(tokenizer: Tokenizer, example: Example, *, chat: bool, end: int) -> Encoded:
    """Ids of one example in one form, with the end-of-text id at the end."""
    if chat:
        prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": example.prompt}]))
        answer = tokenizer.encode_continuation(example.answer)
    else:
        prompt = tokenizer.encode_prompt(example.prompt)
        answer = tokenizer.encode_continuation(" " + example.answer)
    return Encoded((*prompt, *answer, end), len(answer) + 1)


def plan_batches(sequences: Sequence[Sequence[Encoded]], settings: TrainSettings) -> list[list[Encoded]]:
    """All batches of all epochs, in order; they depend only on the settings and the data.

    Args:
        sequences: for each example its forms (one, or chat and raw); epoch e takes form (i + e) mod forms.
    """
    rng = random.Random(settings.seed)
    plan: list[list[Encoded]] = []
    for epoch in range(settings.epochs):
        chosen = [forms[(i + epoch) % len(forms)] for i, forms in enumerate(sequences)]
        rng.shuffle(chosen)
        window = settings.batch * 8  # examples of similar length share a batch, so padding stays small
        batches: list[list[Encoded]] = []
        for start in range(0, len(chosen), window):
            part = sorted(chosen[start : start + window], key=lambda s: len(s.ids))
            batches += [part[i : i + settings.batch] for i in range(0, len(part), settings.batch)]
        rng.shuffle(batches)
        plan += batches
    return plan


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 6 % of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, round(0.06 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
