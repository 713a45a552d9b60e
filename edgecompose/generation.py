"""Answers from logits: greedy and sampled decoding, streaming, and scores of given choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecompose.decoder import Decoding
from edgecompose.errors import GenerationError
from edgecompose.tokenization import Tokenizer

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn: `temperature` > 0 divides the logits, `top_p` in (0, 1] cuts the tail."""

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise GenerationError(f"sampling temperature is {self.temperature}; a positive number is wanted")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"sampling top-p is {self.top_p}; a number in (0, 1] is wanted")
        if self.seed < 0:
            raise GenerationError(f"seed is {self.seed}; 0 or more is wanted")


def generate(
    decoding: Decoding, logits: Float, *, max_tokens: int, end_tokens: Sequence[int], sampling: Sampling | None = None
) -> Iterator[int]:
    """Token ids of the answer, one by one, without the end token.

    Args:
        decoding: a sequence that has read the prompt.
        logits: (vocabulary,), those after the prompt's last token.
        max_tokens: at least 1.
        sampling: None for greedy decoding.
    """
    draw = _greedy if sampling is None else _sampler(sampling)
    for position in range(max_tokens):
        token = draw(logits)
        if token in end_tokens:
            return
        yield token
        if position + 1 < max_tokens:
            logits = decoding.forward([token])[0]


def stream_text(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """(token, text that it completed); a last pair with token -1 carries what was held back, if anything.

    White space before the first character is dropped: it belongs to the prompt's form, not to the answer.
    """
    stream, begun = tokenizer.stream(), False
    for token in tokens:
        text = stream.push(token)
        text = text if begun else text.lstrip()
        begun = begun or bool(text)
        yield token, text
    rest = stream.finish()
    rest = rest if begun else rest.lstrip()
    if rest:
        yield -1, rest


def score_choices(decoding: Decoding, logits: Float, choices: Sequence[Sequence[int]]) -> list[float]:
    """Mean log-likelihood (nats a token) of each choice after the prompt.

    The prompt's cache is used for every choice: a choice is appended, scored, and taken back.

    Args:
        decoding: a sequence that has read the prompt.
        logits: (vocabulary,), those after the prompt's last token.
        choices: token ids of each, at least one id each.

    Raises:
        GenerationError: a choice without tokens.
    """
    if any(len(choice) == 0 for choice in choices):
        raise GenerationError("an empty choice cannot be scored; give some text for each")
    prompt, first = decoding.length, logits.copy()
    scores = []
    for choice in choices:
        rows = first[None]
        if len(choice) > 1:
            rows = np.concatenate([rows, decoding.forward(choice[:-1], kept=len(choice) - 1)])
            decoding.rewind(prompt)
        likelihoods = log_softmax(rows)[np.arange(len(choice)), np.asarray(choice)]
        scores.append(float(likelihoods.mean()))
    return scores


def log_softmax(logits: Float) -> Float:
    """Log-probabilities (nats) along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float32)


def _greedy(logits: Float) -> int:
    return int(logits.argmax())


def _sampler(sampling: Sampling) -> Callable[[Float], int]:
    rng = np.random.default_rng(sampling.seed)

    def draw(logits: Float) -> int:
        shifted = (logits - logits.max()).astype(np.float64)
        with np.errstate(over="ignore"):  # a very low temperature: all but the largest vanish
            probabilities = np.exp(shifted / sampling.temperature)
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        cumulative = np.cumsum(probabilities[order])
        kept = order[: int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1]
        shares = probabilities[kept] / probabilities[kept].sum()
        return int(rng.choice(kept, p=shares))

    return draw
