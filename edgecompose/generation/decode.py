"""Answers from logits: decoding, streaming, stop strings, and scores of given choices."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgecompose.engine.decoder import Decoding
from edgecompose.errors import GenerationError
from edgecompose.generation.sampler import likeliest
from edgecompose.generation.tokenizer import Tokenizer

Float = npt.NDArray[np.float32]


#: Why an answer ended: the model or a stop string ended it, or it had as many tokens as it may.
Finish = Literal["stop", "length"]


def generate(
    decoding: Decoding,
    logits: Float,
    *,
    max_tokens: int,
    end_tokens: Sequence[int],
    draw: Callable[[Float], int] = likeliest,
) -> Generator[int, None, Finish]:
    """Token ids of the answer, one by one, without the end token; returns why it ended.

    Args:
        decoding: a sequence that has read the prompt.
        logits: (vocabulary,), those after the prompt's last token.
        max_tokens: at least 1.
        draw: the next token from logits.
    """
    for position in range(max_tokens):
        token = draw(logits)
        if token in end_tokens:
            return "stop"
        yield token
        if position + 1 < max_tokens:
            logits = decoding.forward([token])[0]
    return "length"


def stream_text(
    tokens: Generator[int, None, Finish], tokenizer: Tokenizer, stop: Sequence[str] = ()
) -> Generator[tuple[int, str], None, Finish]:
    """(token, text that is certain since then); a last pair with token -1 carries what was held back, if anything.

    White space before the first character is dropped: it belongs to the prompt's form, not to the answer. The answer
    ends before the first of the `stop` strings in what is left; text that may yet become one is held back.
    """
    stream, guard, begun = tokenizer.stream(), StopStrings(stop), False
    while True:
        try:
            token, text = next(tokens), ""
        except StopIteration as ended:
            rest, found = guard.push(_unless(begun, stream.finish()))
            rest += guard.finish()
            if rest:
                yield -1, rest
            return "stop" if found else ended.value
        text = _unless(begun, stream.push(token))
        begun = begun or bool(text)
        shown, found = guard.push(text)
        yield token, shown
        if found:
            tokens.close()
            return "stop"


class StopStrings:
    """Watches a growing text for strings that end it, and holds back what may yet become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; what may be shown now, and whether a stop string was reached, which is not shown."""
        text, self._held = self._held + text, ""
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            return text[: min(found)], True
        held = max((_begun(text, stop) for stop in self._stop), default=0)
        shown = len(text) - held
        self._held = text[shown:]
        return text[:shown], False

    def finish(self) -> str:
        """What was still held back."""
        held, self._held = self._held, ""
        return held


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


def _unless(begun: bool, text: str) -> str:
    return text if begun else text.lstrip()


def _begun(text: str, stop: str) -> int:
    """How many characters of `stop` the text ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
