"""Answers of other prompts as tokens, which drafts are looked up in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from edgecompose.generation.tokenizer import Tokenizer

#: How many answers are read for one, and their characters together: about 1,300 tokens, which take some 5 ms.
MOST, MOST_CHARACTERS = 64, 4_096


def example_tokens(tokenizer: Tokenizer, answers: Iterable[str], *, raw: bool) -> Iterator[list[int]]:
    """Token ids of answers, as they would follow their prompts; one that comes again is passed over.

    Args:
        answers: the most alike first; no more are read than are needed.
        raw: whether the prompt is sent as it is, and not in a chat template.
    """
    left, seen = MOST_CHARACTERS, set[str]()
    for text in itertools.islice(answers, MOST):
        shown = text[:left]
        if text not in seen:
            seen.add(text)
            yield tokenizer.encode_continuation(f" {shown}" if raw else shown)
            left -= len(shown)
            if not left:
                return
