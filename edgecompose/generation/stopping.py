"""Turns the tokens of an answer into text, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from edgecompose.generation.tokenizer import Tokenizer


class AnswerText:
    """Turns tokens into the text of an answer.

    The answer ends before the first of the `stop` strings; text that may yet become one is held back.

    Args:
        keep_space: keep white space before the first character, as where the text goes on from the prompt. By default
            it is dropped: it belongs to the prompt's form, not to the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, keep_space: bool = False) -> None:
        self._stream, self._stop = tokenizer.stream(), StopStrings(stop)
        self._begun = keep_space
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; the text that is certain since then. `stopped` tells whether a stop string ended it."""
        return self._shown(self._stream.push(token))

    def finish(self) -> str:
        """The text that was held back."""
        rest = self._shown(self._stream.finish())
        return rest if self.stopped else rest + self._stop.finish()

    def _shown(self, text: str) -> str:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        shown, self.stopped = self._stop.push(text)
        return shown


class StopStrings:
    """Watches a growing text for strings that end it, and holds back what may yet become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; what may be shown now, and whether a stop string was reached, which is not shown."""
        text, self._held = self._held + text, ""
        places = [place for place in map(text.find, self._stop) if place >= 0]
        if places:
            return text[: min(places)], True
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        shown = len(text) - held
        self._held = text[shown:]
        return text[:shown], False

    def finish(self) -> str:
        """What was still held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters of `stop` the text ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
